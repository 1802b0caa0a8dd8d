"""Taps: what any inner layer of a model gives, pooled to one vector an image.

Axes: N images, C channels, H and W positions, T tokens, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import SwinTransformer
from torchvision.ops.misc import Permute

from tldist.errors import ModelError, close_matches

GEM_POWER = 3.0
GEM_LEAST = 1e-6
SHORTEST = 1e-12
"""Vectors are not divided by less than this."""

_Writer = tuple[int, int]
"""What the last layer with weights wrote: the number of channels, and their axis (1, or -1 for the last)."""


def pool_mean(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The mean over the axes ``positions``."""
    return values.mean(positions)


def pool_max(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The maximum over the axes ``positions``."""
    return values.amax(positions)


def pool_gem(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The generalised mean ``mean(max(x, eps)^p)^(1/p)``, p = 3: eq. 3 of arXiv:1711.02512."""
    powers = values.clamp(min=GEM_LEAST).pow(GEM_POWER)
    return powers.mean(positions).pow(1 / GEM_POWER)


def pool_token(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    """The first token of (N, T, D): the class token of a vision transformer."""
    if values.dim() != 3 or positions != (1,):
        raise ModelError(
            f"pool=token takes the first of the tokens (N, T, D) of a transformer; found values of shape "
            f"{tuple(values.shape)}. Use pool=mean."
        )
    return values[:, 0]


def pool_flatten(values: Tensor, positions: tuple[int, ...]) -> Tensor:
    """All values of an image in a row, in the order in which the layer gives them."""
    return values.flatten(1)


POOLS: Mapping[str, Callable[[Tensor, tuple[int, ...]], Tensor]] = {
    "mean": pool_mean,
    "gem": pool_gem,
    "max": pool_max,
    "token": pool_token,
    "flatten": pool_flatten,
}
"""How values that have positions become one vector, by the name that recipes use."""


def pool_features(values: Tensor, axis: int, pool: str = "mean") -> Tensor:
    """What a layer gives to one vector an image.

    Args:
        values: (N, D), (N, T, D), (N, C, H, W) or (N, H, W, C); (N, D) has no positions and stays as it is.
        axis: of the channels.
        pool: a name of `POOLS`.

    Returns:
        (N, D), in memory of its own: a later layer may overwrite ``values``.

    Raises:
        ModelError: an unknown pool, or one that the values do not suit.
    """
    if pool not in POOLS:
        raise ModelError(f"unknown pool '{pool}'. {close_matches(pool, POOLS)}")
    if values.dim() == 2:
        return values.clone()
    positions = tuple(place for place in range(1, values.dim()) if place != axis % values.dim())
    pooled = POOLS[pool](values, positions)
    return pooled.clone() if pool in ("token", "flatten") else pooled


def unit_length(features: Tensor) -> Tensor:
    """Each row of (N, D) divided by its length; a row of zeros stays."""
    # Not nn.functional.normalize: it expands the lengths to the features' shape, three nodes more in ONNX.
    return features / features.norm(dim=1, keepdim=True).clamp_min(SHORTEST)


@dataclass(frozen=True)
class Tap:
    """A layer whose output is wanted.

    Attributes:
        path: of the module, as in ``named_modules()`` and ``tldist layers``.
        axis: of the channels in its output.
    """

    path: str
    axis: int


@torch.no_grad()
def find_taps(model: nn.Module, layers: Sequence[str], images: Tensor) -> tuple[Tap, ...]:
    """Find inner layers, and which axis of what they give is the channels, by one forward pass.

    Of four axes, convolutional networks have the channels second, (N, C, H, W), and Swin has them last,
    (N, H, W, C); of three, they are last, (N, T, D). The rule: the channels are the axis that is as long as
    the last layer with weights (up to the end of the tapped one) has outputs. Where both axes are, or none,
    that layer's kind decides (convolution, BatchNorm: second; linear, LayerNorm: last), and it must agree
    with the architecture: last in torchvision's Swin and where timm says ``output_fmt = "NHWC"``.

    Args:
        model: in evaluation mode. In an ensemble or a concatenation, paths lead through its members:
            ``members.0.model.layer4``.
        layers: paths of modules; of a layer that runs several times, the last run counts.
        images: the model's normalised input, (N, 3, H, W).

    Raises:
        ModelError: a name is unknown or given twice; or a layer does not run, gives something else than one
            row an image, or its channels cannot be told.
    """
    modules = _named(model, layers)
    seen: dict[str, tuple[Any, _Writer | None]] = {}
    writer: list[_Writer] = []

    def write(module: nn.Module, _: Any, __: Any) -> None:
        writer[:] = _written(module, writer)

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[path] = (_shape(output), writer[0] if writer else None)

        return hook

    with ExitStack() as stack:
        # Registered first, so that a layer with weights has written before it is looked at.
        for module in modules.values():
            stack.callback(module.register_forward_hook(write).remove)
        for path in layers:
            stack.callback(modules[path].register_forward_hook(keep(path)).remove)
        model(images)
    return tuple(
        Tap(path, _channel_axis(path, *_checked(path, seen, len(images)), _channels_last(modules, path)))
        for path in layers
    )


@contextmanager
def tapped_layers(
    model: nn.Module, taps: Sequence[Tap], pool: str = "mean"
) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """While inside, what layers give in a forward pass can be had as (N, D) features.

    Args:
        model: as `find_taps` saw it.
        taps: from `find_taps`.
        pool: a name of `POOLS`.

    Yields:
        A function that gives the features of the last forward pass, by path.
    """
    found: dict[str, Tensor] = {}

    def keep(tap: Tap) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            # Pooled at once: the next layer may compute in place.
            found[tap.path] = pool_features(_first(output), tap.axis, pool)

        return hook

    with ExitStack() as stack:
        for tap in taps:
            stack.callback(model.get_submodule(tap.path).register_forward_hook(keep(tap)).remove)
        yield lambda: dict(found)


def _named(model: nn.Module, layers: Sequence[str]) -> dict[str, nn.Module]:
    """All modules by path."""
    modules = dict(model.named_modules())
    for place, path in enumerate(layers):
        if not path or path not in modules:
            known = [name for name in modules if name]
            raise ModelError(
                f"layer '{path}': {type(model).__name__} has none of this name. "
                f"{close_matches(path, known)} `tldist layers MODEL` lists them all."
            )
        if path in layers[:place]:
            raise ModelError(f"layer '{path}' is given twice.")
    return modules


def _written(module: nn.Module, before: list[_Writer]) -> list[_Writer]:
    """What was written last, after a module has run."""
    if isinstance(module, Permute) and before and len(module.dims) == 4:
        width, axis = before[0]
        return [(width, 1 if module.dims.index(axis % 4) == 1 else -1)]
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return [(module.out_channels, 1)]
    if isinstance(module, _BatchNorm):
        return [(module.num_features, 1)]
    if isinstance(module, nn.GroupNorm):
        return [(module.num_channels, 1)]
    if isinstance(module, nn.LayerNorm):  # torchvision's and timm's LayerNorm2d permute inside
        return [(module.normalized_shape[-1], 1 if type(module).__name__.endswith("2d") else -1)]
    if isinstance(module, nn.Linear):
        return [(module.out_features, -1)]
    return before


def _first(output: Any) -> Any:
    """The output of a layer; of several (attention gives its weights too), the first."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _shape(output: Any) -> Any:
    values = _first(output)
    return tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__


def _checked(
    path: str, seen: Mapping[str, tuple[Any, _Writer | None]], num_images: int
) -> tuple[tuple[int, ...], _Writer | None]:
    if path not in seen:
        raise ModelError(f"layer '{path}' does not run when the model answers; it has no features.")
    shape, writer = seen[path]
    if not isinstance(shape, tuple) or not 2 <= len(shape) <= 4 or shape[0] != num_images:
        raise ModelError(
            f"layer '{path}' gives {shape} for {num_images} images; expected (N, D), (N, T, D), (N, C, H, W) "
            f"or (N, H, W, C). Choose a layer around it."
        )
    return shape, writer


def _channels_last(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether the architecture that a layer is part of has its channels last."""
    names = path.split(".")
    around = [modules[".".join(names[:count])] for count in range(len(names) + 1)]
    return any(
        isinstance(module, SwinTransformer) or getattr(module, "output_fmt", None) == "NHWC"
        for module in around
    )


def _channel_axis(path: str, shape: tuple[int, ...], writer: _Writer | None, channels_last: bool) -> int:
    """The axis of the channels: 1, or -1."""
    if len(shape) == 2:
        return -1
    usual = -1 if len(shape) == 3 or channels_last else 1
    width, own = writer or (-1, usual)
    fitting = [axis for axis in (1, -1) if shape[axis] == width]
    if len(fitting) == 1:
        return fitting[0]
    if own != usual:
        raise ModelError(
            f"layer '{path}' gives {shape}, and which of these axes is the channels cannot be told. "
            f"Choose a layer around it, or images of another size."
        )
    return own
