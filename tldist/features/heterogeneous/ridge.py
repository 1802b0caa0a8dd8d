"""The linear map between two models' features by ridge regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tldist.features.cross_moments import CrossMoments
from tldist.features.heterogeneous.maps import Into, Maps, one_way

GRID = tuple(float(value) for value in torch.logspace(-8, 3, 45, dtype=torch.float64))
"""Ridges that are tried: multiples of the mean variance of what is mapped."""


def fit_ridge(pairs: CrossMoments, ridge: float | None = None, *, into: Into = "source") -> Maps:
    """One linear layer from one model's features to the other's, in closed form.

    Minimises ``|XW + b - Y|^2 + l |W|^2`` (Hoerl and Kennard, 1970; b is free) from the moments of the
    pairs. A head is best fitted on features as they are and fed with the regression's answers, which are
    their expectation: so by default target features are mapped into the source's space, and the source's
    stay. With ``into="target"`` it is ``Linear(in=source, out=target)`` and the target's stay; there the head
    learns from features that the regression has shrunk, and reads others.

    Args:
        pairs: at least 3.
        ridge: l, in multiples of N times the mean variance of what is mapped, so that it has no unit; None:
            the one of `GRID` with the least generalised cross-validation error (`gcv_errors`).
        into: whose space is the common one.

    Returns:
        The maps; ``details`` holds the ridge, the errors of the grid where it was searched, and the share
        of the variance in the common space that the map explains on the pairs.

    Raises:
        DomainError: fewer than 3 pairs.
    """
    pairs.check_count(3)
    pairs = pairs if into == "target" else pairs.swapped()
    values, vectors, turned = _decompose(pairs)
    unit = float(values.sum()) / len(values)
    details: dict[str, Any] = {"into": into}
    if ridge is None:
        errors = gcv_errors(pairs, GRID)
        ridge = GRID[int(torch.tensor(errors, dtype=torch.float64).argmin())]
        details["gcv"] = [list(pair) for pair in zip(GRID, errors)]
    weight = (vectors @ (_inverse(values, ridge * unit)[:, None] * turned)).T
    explained = _explained(values, turned, ridge * unit)
    total = float(pairs.scatters[2].trace())
    details |= {"ridge": ridge, "explained": explained / total if total else 1.0, "pairs": pairs.count}
    return one_way(weight, pairs, into, details)


def gcv_errors(pairs: CrossMoments, ridges: tuple[float, ...]) -> list[float]:
    """The generalised cross-validation error of each ridge: mean over pairs, summed over dimensions.

    ``(RSS / N) / (1 - df / N)^2``: Golub, Heath and Wahba (1979), eq. 1.4, with the trace of the hat matrix
    (the mean counts as one) as df: an approximation of the leave-one-out error that moments suffice for.
    Infinite where df reaches N.

    Args:
        pairs: the moments; x is mapped to y.
        ridges: as in `fit_ridge`.
    """
    values, _, turned = _decompose(pairs)
    unit, total = float(values.sum()) / len(values), float(pairs.scatters[2].trace())
    errors = []
    for ridge in ridges:
        strength = ridge * unit
        free = 1 - (float((values * _inverse(values, strength)).sum()) + 1) / pairs.count
        residual = max(0.0, total - _explained(values, turned, strength))
        errors.append(residual / pairs.count / free**2 if free > 1e-9 else float("inf"))
    return errors


def _decompose(pairs: CrossMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (D,) and eigenvectors (D, D) of x's scatter; the cross-scatter in these axes."""
    of_x, cross, _ = pairs.scatters
    values, vectors = torch.linalg.eigh(of_x)
    return values.clamp_min(0), vectors, vectors.T @ cross


def _inverse(values: Tensor, strength: float) -> Tensor:
    """1 / (value + strength); 0 for directions without variance, of which pairs say nothing."""
    alive = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    return torch.where(alive, 1 / (values + strength).where(alive, torch.ones_like(values)), 0.0)


def _explained(values: Tensor, turned: Tensor, strength: float) -> float:
    """|Y|^2 - |Y - XW|^2 of deviations from the means."""
    inverse = _inverse(values, strength)
    return float((turned.square().sum(1) * (2 * inverse - values * inverse.square())).sum())
