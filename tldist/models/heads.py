"""The head: the last layer that answers the task; found, replaced, and known by class names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tldist.errors import ModelError

Head = nn.Linear | nn.Conv2d


class Several(nn.Module):
    """A model of several models, each with a head; it has none of its own."""

    @property
    def parts(self) -> list[nn.Module]:
        """The models."""
        raise NotImplementedError

    @property
    def num_outputs(self) -> int:
        """Number of outputs of the whole."""
        raise NotImplementedError


def find_head(model: nn.Module) -> tuple[str, Head]:
    """The path and the module of the last linear or convolution layer.

    Raises:
        ModelError: there is none, or the model is several, each with its own.
    """
    if isinstance(model, Several):
        raise no_single_head()
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, Head)]
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear or convolution layer to serve as its head.")
    return found[-1]


def no_single_head() -> ModelError:
    """What to say where a head is asked of an ensemble."""
    return ModelError(
        "an ensemble has no head of its own to train, fit or merge: its members have. Distil it into one "
        "model (tldist fuse method=distill), or do this to its members and make the ensemble again."
    )


def single_models(model: nn.Module) -> list[nn.Module]:
    """The models with a head each that a model consists of: itself, or all in an ensemble."""
    if isinstance(model, Several):
        return [single for part in model.parts for single in single_models(part)]
    return [model]


def num_logits(model: nn.Module) -> int:
    """Number of outputs of a classifier."""
    return model.num_outputs if isinstance(model, Several) else head_outputs(find_head(model)[1])


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
def tapped(
    model: nn.Module, reduce: Callable[[Tensor, Head], Tensor] | None = None
) -> Iterator[Callable[[], Tensor]]:
    """While inside, what the head reads in a forward pass can be had as (N, D) features.

    The features of an ensemble are those of its members side by side.

    Args:
        model: with one head, or several models with a head each.
        reduce: from what a head reads, and the head, to (N, D); None: the mean over space.

    Yields:
        A function that gives the features of the last forward pass.
    """
    with ExitStack() as stack:
        taps = [stack.enter_context(_tapped(single, reduce)) for single in single_models(model)]
        yield lambda: taps[0]() if len(taps) == 1 else torch.cat([tap() for tap in taps], 1)


@contextmanager
def _tapped(
    model: nn.Module, reduce: Callable[[Tensor, Head], Tensor] | None
) -> Iterator[Callable[[], Tensor]]:
    seen: list[Tensor] = []
    head = find_head(model)[1]

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0]]

    handle = head.register_forward_pre_hook(keep)
    try:
        yield lambda: reduce(seen[0], head) if reduce else pool(seen[0])
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
