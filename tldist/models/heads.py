"""The head: the last layer that answers the task; found, replaced, and known by class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tldist.errors import ModelError

Head = nn.Linear | nn.Conv2d


def find_head(model: nn.Module) -> tuple[str, Head]:
    """The path and the module of the last linear or convolution layer.

    Raises:
        ModelError: there is none.
    """
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Head)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear or convolution layer to serve as its head.")
    return found[-1]


def head_width(head: Head) -> int:
    """Width of the features that the head reads."""
    return head.in_features if isinstance(head, nn.Linear) else head.in_channels


def head_outputs(head: Head) -> int:
    """Number of outputs."""
    return head.out_features if isinstance(head, nn.Linear) else head.out_channels


def pool(features: Tensor) -> Tensor:
    """(N, D), (N, D, H, W) or (N, D, 1, 1) to (N, D): the mean over space."""
    return features.flatten(2).mean(2) if features.dim() > 2 else features


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` at the dotted ``path``."""
    parent_path, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent_path), name, module)


@contextmanager
def tapped(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """While inside, what the head reads in a forward pass can be had as (N, D) features.

    Yields:
        A function that gives the features of the last forward pass.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0]]

    handle = find_head(model)[1].register_forward_pre_hook(keep)
    try:
        yield lambda: pool(seen[0])
    finally:
        handle.remove()


@torch.no_grad()
def copy_rows_by_name(
    head: Head, weight: Tensor, bias: Tensor | None, old: Sequence[str], new: Sequence[str]
) -> int:
    """Copy the rows of the classes that both heads know, by name.

    Args:
        head: the new head, with one output a class of ``new``.
        weight, bias: of the old head, one row a class of ``old``.
        old, new: class names.

    Returns:
        How many rows were copied.
    """
    position = {name: row for row, name in enumerate(old)}
    shared = [(row, position[name]) for row, name in enumerate(new) if name in position]
    for to, origin in shared:
        head.weight[to] = weight[origin].to(head.weight.dtype)
        if head.bias is not None and bias is not None:
            head.bias[to] = bias[origin].to(head.bias.dtype)
    return len(shared)
