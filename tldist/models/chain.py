"""backbone -> transform* -> head: a model whose features pass through maps into a common space."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tldist.models.heads import find_head, pool, replace_module
from tldist.models.transforms import Affine, Scale, Transform, build_transform

__all__ = ["Affine", "Chain", "Scale", "Transform", "build_transform", "fold", "folded"]


class Chain(nn.Module):
    """A headless backbone, transforms of its features, and a head.

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


def folded(chain: Chain) -> Chain:
    """The same function with its affine transforms folded into their neighbours, for what only runs it.

    A bundle keeps them apart, so that its description stays readable and its features are those of the
    common space. What the head reads here are other features.
    """
    transforms, head = fold(list(chain.transforms), chain.head)
    same = copy.copy(chain)  # shares the backbone
    same._modules = {**chain._modules, "transforms": nn.ModuleList(transforms), "head": head}
    return same


@torch.no_grad()
def fold(transforms: Sequence[nn.Module], head: nn.Linear) -> tuple[list[nn.Module], nn.Linear]:
    """Put affine transforms and a linear head together, where that makes no more multiplications.

    Products are formed in float64 and rounded once, so the function is the same up to rounding.

    Args:
        transforms: in the order in which features pass them.
        head: after the last.

    Returns:
        What is left of both; the given modules stay as they are.
    """
    left: list[nn.Module] = []
    for module in [*transforms, head]:
        while left and (joined := _joined(left[-1], module)) is not None:
            module = joined
            left.pop()
        left.append(module)
    last = left.pop()
    assert isinstance(last, nn.Linear)
    return left, last


def _joined(first: nn.Module, second: nn.Module) -> nn.Module | None:
    """Two affine maps as one of the second's kind; None where they are not, or would cost more as one."""
    if not isinstance(first, Affine | Scale) or not (
        isinstance(second, Affine | Scale) or type(second) is nn.Linear
    ):
        return None
    if isinstance(first, Scale) and isinstance(second, Scale):
        scale = Scale(len(first.weight)).to(first.weight)
        scale.weight = first.weight * second.weight
        scale.bias = first.bias * second.weight + second.bias
        return scale
    (inner, offset), (outer, shift) = _matrix(first), _matrix(second)
    apart = inner.numel() * isinstance(first, Affine) + outer.numel() * (not isinstance(second, Scale))
    weight, bias = outer @ inner, outer @ offset + shift
    if weight.numel() > apart:
        return None
    own = next(first.buffers())
    if not isinstance(second, nn.Linear):
        return Affine.of(weight.to(own), bias.to(own))
    head = nn.Linear(weight.shape[1], weight.shape[0]).to(own)
    head.weight.copy_(weight), head.bias.copy_(bias)
    return head.requires_grad_(second.weight.requires_grad)


def _matrix(module: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight (D_out, D_in) and bias of an affine map, in float64."""
    assert isinstance(module, Affine | Scale | nn.Linear)
    weight = module.weight.double()
    bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias.double()
    return (weight.diag() if isinstance(module, Scale) else weight), bias
