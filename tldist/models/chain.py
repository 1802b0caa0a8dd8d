"""backbone -> transform* -> head: a model whose features pass through maps into a common space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tldist.errors import BundleError
from tldist.models.heads import find_head, pool, replace_module


class Affine(nn.Module):
    """``x -> x @ weight.T + bias`` with fixed (not trained) weight (D_out, D_in) and bias (D_out,)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(out_features, in_features))
        self.register_buffer("bias", torch.zeros(out_features))

    def forward(self, features: Tensor) -> Tensor:
        """(N, D_in) to (N, D_out)."""
        return nn.functional.linear(features, self.weight, self.bias)

    def describe(self) -> dict[str, Any]:
        """As plain data."""
        return {"type": "affine", "in": self.weight.shape[1], "out": self.weight.shape[0]}


class Scale(nn.Module):
    """``x -> x * weight + bias``, element by element, with fixed weight and bias (D,)."""

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


Transform = Affine | Scale


def build_transform(description: Mapping[str, Any]) -> Transform:
    """The transform of a description, to be filled with its tensors."""
    kind = description.get("type")
    if kind == "affine":
        return Affine(int(description["in"]), int(description["out"]))
    if kind == "scale":
        return Scale(int(description["in"]))
    raise BundleError(f"transform of unknown type '{kind}' (known: affine, scale).")


class Chain(nn.Module):
    """A headless backbone, transforms of its features, and a linear head.

    Args:
        backbone: a classifier network; its head is taken off.
        transforms: maps of (N, D) features.
        head: reads the last transform's output.
    """

    def __init__(self, backbone: nn.Module, transforms: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        replace_module(backbone, find_head(backbone)[0], nn.Identity())
        self.backbone = backbone
        self.transforms = nn.ModuleList(transforms)
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        features = pool(self.backbone(images))
        for transform in self.transforms:
            features = transform(features)
        logits: Tensor = self.head(features)
        return logits
