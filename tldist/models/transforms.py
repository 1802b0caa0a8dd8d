"""Transforms: fixed maps of features into a common space, as modules that plain data describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tldist.errors import BundleError

Array = TypeVar("Array", Tensor, np.ndarray)


class Transform(nn.Module):
    """A fixed (not trained) map of features, (N, D_in) to (N, D_out); its numbers are buffers."""

    def describe(self) -> dict[str, Any]:
        """As plain data, from which `build_transform` builds it again."""
        raise NotImplementedError

    @torch.no_grad()
    def transform(self, features: Array) -> Array:
        """Map features (N, D_in) that lie in memory.

        Args:
            features: a NumPy array or a tensor, of any float type.

        Returns:
            (N, D_out) of the kind and the float type that was given (float64 for whole numbers), computed in
            the transform's own precision: float64 as fitted.
        """
        values = torch.as_tensor(features)
        own = next(self.buffers())
        found = self(values.to(own))
        found = found.to(values.device, values.dtype if values.is_floating_point() else torch.float64)
        return found.numpy() if isinstance(features, np.ndarray) else found


class Affine(Transform):
    """``x -> x @ weight.T + bias`` with weight (D_out, D_in) and bias (D_out,)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(out_features, in_features))
        self.register_buffer("bias", torch.zeros(out_features))

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Affine:
        """The map of a weight (D_out, D_in) and a bias (D_out,), in their precision."""
        affine = cls(weight.shape[1], weight.shape[0]).to(weight.dtype)
        affine.weight, affine.bias = weight, bias
        return affine

    def forward(self, features: Tensor) -> Tensor:
        """(N, D_in) to (N, D_out)."""
        return nn.functional.linear(features, self.weight, self.bias)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {"type": "affine", "in": self.weight.shape[1], "out": self.weight.shape[0]}


class Scale(Transform):
    """``x -> x * weight + bias``, element by element, with weight and bias (D,)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(features))
        self.register_buffer("bias", torch.zeros(features))

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return features * self.weight + self.bias

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {"type": "scale", "in": self.weight.shape[0], "out": self.weight.shape[0]}


class Kernel(Transform):
    """``x -> k(x) @ weight.T + bias``, where ``k_m(x) = exp(-gamma |x - landmark_m|^2)``.

    Centred and scaled before the squares are taken, so that they are of the order of 1: distances by a
    product of matrices would lose digits in float32 where the features lie far from the origin.
    """

    centre: Tensor  # (D,)
    scale: Tensor  # (1,): the root of gamma
    landmarks: Tensor  # (M, D), centred and scaled
    weight: Tensor  # (D_out, M)
    bias: Tensor  # (D_out,)

    def __init__(self, in_features: int, landmarks: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(in_features))
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("landmarks", torch.zeros(landmarks, in_features))
        self.register_buffer("weight", torch.zeros(out_features, landmarks))
        self.register_buffer("bias", torch.zeros(out_features))

    @classmethod
    def of(cls, landmarks: Tensor, gamma: float, weight: Tensor | None = None) -> Kernel:
        """The map of landmarks (M, D) and a weight (D_out, M); None: the kernel's own values."""
        count, width = landmarks.shape
        weight = torch.eye(count).to(landmarks) if weight is None else weight
        kernel = cls(width, count, len(weight)).to(landmarks.dtype)
        kernel.centre = landmarks.mean(0)
        kernel.scale = torch.full((1,), gamma**0.5, dtype=landmarks.dtype)
        kernel.landmarks = (landmarks - kernel.centre) * kernel.scale
        kernel.weight = weight
        return kernel

    def forward(self, features: Tensor) -> Tensor:
        """(N, D_in) to (N, D_out)."""
        return nn.functional.linear(self.values(features), self.weight, self.bias)

    def values(self, features: Tensor) -> Tensor:
        """The kernel between features (N, D_in) and the landmarks, (N, M)."""
        points = (features - self.centre) * self.scale
        squares = points.square().sum(1, keepdim=True) + self.landmarks.square().sum(1)
        return (-(squares - 2 * points @ self.landmarks.T).clamp_min(0)).exp()

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        count, width = self.landmarks.shape
        return {"type": "kernel", "in": width, "landmarks": count, "out": self.weight.shape[0]}


class Mlp(Transform):
    """``x -> x @ weight.T + bias + relu(x @ inner.T + inner_bias) @ outer.T``: affine, and a hidden layer."""

    weight: Tensor  # (D_out, D_in)
    bias: Tensor  # (D_out,)
    inner: Tensor  # (H, D_in)
    inner_bias: Tensor  # (H,)
    outer: Tensor  # (D_out, H)

    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(out_features, in_features))
        self.register_buffer("bias", torch.zeros(out_features))
        self.register_buffer("inner", torch.zeros(hidden, in_features))
        self.register_buffer("inner_bias", torch.zeros(hidden))
        self.register_buffer("outer", torch.zeros(out_features, hidden))

    def forward(self, features: Tensor) -> Tensor:
        """(N, D_in) to (N, D_out)."""
        hidden = nn.functional.linear(features, self.inner, self.inner_bias).relu()
        return nn.functional.linear(features, self.weight, self.bias) + hidden @ self.outer.T

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        hidden, width = self.inner.shape
        return {"type": "mlp", "in": width, "hidden": hidden, "out": self.weight.shape[0]}


class Displace(Transform):
    """``x -> x + shift_m`` of the nearest point m: how samples that were moved one by one carry others along.

    The out-of-sample rule of Ferradans et al., arXiv:1307.5551, section 4.2, as POT has it.
    """

    centre: Tensor  # (D,)
    points: Tensor  # (M, D), centred
    shifts: Tensor  # (M, D)

    def __init__(self, in_features: int, points: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(in_features))
        self.register_buffer("points", torch.zeros(points, in_features))
        self.register_buffer("shifts", torch.zeros(points, in_features))

    @classmethod
    def of(cls, points: Tensor, moved: Tensor) -> Displace:
        """The map that takes points (M, D) to where they were moved, (M, D)."""
        displace = cls(points.shape[1], len(points)).to(points.dtype)
        displace.centre = points.mean(0)
        displace.points = points - displace.centre
        displace.shifts = moved - points
        return displace

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        centred = features - self.centre
        squares = self.points.square().sum(1) - 2 * centred @ self.points.T  # less |x|^2: the same for all
        return features + self.shifts[squares.argmin(1)]

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        count, width = self.points.shape
        return {"type": "displace", "in": width, "points": count, "out": width}


def build_transform(description: Mapping[str, Any]) -> Transform:
    """The transform of a description, to be filled with its tensors.

    Raises:
        BundleError: it is of an unknown type.
    """

    def size(name: str) -> int:
        return int(description[name])

    match description.get("type"):
        case "affine":
            return Affine(size("in"), size("out"))
        case "scale":
            return Scale(size("in"))
        case "kernel":
            return Kernel(size("in"), size("landmarks"), size("out"))
        case "mlp":
            return Mlp(size("in"), size("hidden"), size("out"))
        case "displace":
            return Displace(size("in"), size("points"))
        case other:
            raise BundleError(
                f"transform of unknown type '{other}' (known: affine, scale, kernel, mlp, displace)."
            )
