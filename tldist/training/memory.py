"""How much memory a training step will take, before it is tried."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

STATES = {"adamw": 2, "sgd": 1}
"""Numbers that an optimiser keeps of each parameter (SGD's momentum)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process; what the libraries, the loader and the allocator's gaps take comes on top.

    Attributes:
        weights: parameters and buffers, and their moving average.
        gradients: of what learns.
        optimizer: its state.
        activations: what the forward pass keeps for the backward pass, of one process's images of a step.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        each = ", ".join(f"{name} {getattr(self, name) / 1e6:,.0f}" for name in parts)
        return f"about {self.total / 1e6:,.0f} MB a process ({each})"


def estimate_memory(
    model: nn.Module,
    runs: nn.Module,
    example: Tensor,
    *,
    images: int,
    optimizer: str,
    averaged: bool,
    autocast: torch.dtype | None,
    shards: int = 1,
) -> MemoryEstimate:
    """Estimate from one forward pass over one example.

    Args:
        model: the whole, frozen as it will be.
        runs: the part of it that runs in a step.
        example: input of ``runs``, (1, ...), on its device.
        images: that a process handles at once.
        optimizer: adamw or sgd.
        averaged: whether a moving average of the weights is kept.
        autocast: the number format of the matrix products; None: float32.
        shards: processes over which weights, gradients and optimiser state are spread.
    """
    weights = sum(t.nbytes for t in model.state_dict().values())
    learning = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return MemoryEstimate(
        weights=weights * (2 if averaged else 1) // shards,
        gradients=learning // shards,
        optimizer=STATES[optimizer] * learning // shards,
        activations=images * _kept_for_backward(runs, example, autocast),
    )


def _kept_for_backward(runs: nn.Module, example: Tensor, autocast: torch.dtype | None) -> int:
    """Bytes that autograd keeps of one example, the parameters apart; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in runs.state_dict().values()}
    kept: dict[int, tuple[int, Tensor]] = {}  # the tensor too: a storage that is let go could come twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    runs.eval()  # a single image has no BatchNorm statistics; what is kept is the same
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast(example.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None),
    ):
        runs(example)
    return sum(size for size, _ in kept.values())
