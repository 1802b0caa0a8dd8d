"""Heads by nearness: the nearest class mean, the nearest samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from tldist.features.heads import HeldOut, LinearHead, Sweep
from tldist.models.neighbours import Neighbours

SHARPNESS = (1.0, 0.3, 0.1, 0.03, 0.01)
"""Multiples of the variance's inverse that a sweep of class means tries."""
NEIGHBOURS = (1, 5, 10, 20, 50)
"""Numbers of neighbours that a sweep tries."""
_TEMPERATURE = 0.07
"""Of the votes of neighbours, as Wu et al. and DINO have it."""
_C = TypeVar("_C")
_H = TypeVar("_H", LinearHead, "NeighbourHead")


@dataclass(frozen=True)
class NeighbourHead:
    """A fitted head of stored samples.

    Attributes:
        module: in float64.
    """

    module: Neighbours

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) of any float type to float64 (N, K): logarithms of probabilities."""
        with torch.no_grad():
            found: Tensor = self.module(features.double())
        return found

    def describe(self) -> dict[str, Any]:
        """As plain data, as a chain's description has it."""
        return self.module.describe()

    def tensors(self) -> dict[str, Tensor]:
        """By the names that the module has for them."""
        return {name: tensor.detach() for name, tensor in self.module.state_dict().items()}


def fit_class_means(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    sharpness: float = 1.0,
    weights: Tensor | None = None,
) -> LinearHead:
    """The nearest class mean as a linear head: ``-s |x - m_k|^2 / 2`` less what is the same for all classes.

    With ``s`` the inverse of the variance within classes (mean over dimensions) the logits are those of
    Gaussians of that variance about the means. A class without samples is never the answer.

    Args:
        features: (N, D), any float type.
        labels: int64 (N,).
        num_classes: K.
        sharpness: this multiple of that inverse is used: probabilities are too sure of themselves where
            dimensions go together.
        weights: (N,) of the samples; None: all alike.
    """
    values = features.double()
    weights = torch.ones(len(values)) if weights is None else weights
    member = torch.nn.functional.one_hot(labels, num_classes).double() * weights.double()[:, None]
    totals = member.sum(0)
    means = member.T @ values / totals.clamp_min(1e-300)[:, None]
    within = weights.double() @ (values - means[labels]).square().mean(1) / totals.sum()
    scale = sharpness / (float(within) or 1.0)
    # About the common mean, which changes no difference: the bias is not one of large numbers.
    centre = weights.double() @ values / totals.sum()
    offsets = means - centre
    there = totals > 0
    weight = scale * offsets * there[:, None]
    heights = -scale * offsets.square().sum(1) / 2
    # Offsets balance, so that everywhere one class at least is not below its height.
    heights = torch.where(there, heights, heights[there].min() - 1e4)
    return LinearHead(weight, heights - weight @ centre, 0.0, True)


def sweep_class_means(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    held_out: Tensor,
    *,
    grid: Sequence[float] = SHARPNESS,
    weights: Tensor | None = None,
) -> Sweep[LinearHead]:
    """Choose how sure the nearest class mean is by held-out samples, then fit on all samples.

    Arguments as in `tldist.features.heads.sweep_logistic`; ``grid`` holds values of ``sharpness``.
    """
    weights = torch.ones(len(features)) if weights is None else weights

    def fit(chosen: Tensor, sharpness: float) -> LinearHead:
        return fit_class_means(
            features[chosen], labels[chosen], num_classes, sharpness=sharpness, weights=weights[chosen]
        )

    return _sweep(fit, grid, HeldOut(features[held_out], labels[held_out], weights[held_out]), held_out)


def fit_neighbours(
    features: Tensor, labels: Tensor, num_classes: int, *, k: int = 20, temperature: float = _TEMPERATURE
) -> NeighbourHead:
    """The weighted vote of the k stored samples of the largest cosine (`tldist.models.neighbours`).

    Args:
        features: (N, D), any float type; all of them are stored, and compared with every sample.
        labels: int64 (N,).
        num_classes: K.
        k: how many vote.
        temperature: of their weights.
    """
    return NeighbourHead(Neighbours.of(features.double(), labels, num_classes, k, temperature))


def sweep_neighbours(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    held_out: Tensor,
    *,
    grid: Sequence[int] = NEIGHBOURS,
) -> Sweep[NeighbourHead]:
    """Choose the number of neighbours by held-out samples, then store all samples.

    Arguments as in `tldist.features.heads.sweep_logistic`; ``grid`` holds values of ``k``.
    """
    most = int((~held_out).sum())
    possible = [k for k in grid if k <= most] or [most]

    def fit(chosen: Tensor, k: int) -> NeighbourHead:
        return fit_neighbours(features[chosen], labels[chosen], num_classes, k=k)

    everyone = torch.ones(int(held_out.sum()))
    return _sweep(fit, possible, HeldOut(features[held_out], labels[held_out], everyone), held_out)


def _sweep(
    fit: Callable[[Tensor, _C], _H], grid: Sequence[_C], judge: HeldOut, held_out: Tensor
) -> Sweep[_H]:
    """The choice of the least held-out loss, fitted on all."""
    found = []
    for choice in grid:
        logits = fit(~held_out, choice).logits(judge.features)
        found.append((judge.loss(logits), judge.accuracy(logits), choice))
    loss, accuracy, best = min(found, key=lambda row: row[0])
    tried = tuple((float(choice), value) for value, _, choice in found)  # type: ignore[arg-type]
    return Sweep(fit(torch.ones_like(held_out), best), accuracy, loss, tried)
