"""The linear map from the source model's features to the target model's, by ridge regression."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tldist.features.heterogeneous.paired import Maps, PairedMoments, affine

GRID = tuple(float(value) for value in torch.logspace(-8, 3, 45, dtype=torch.float64))
"""Ridges that are tried: multiples of the source's mean variance."""


def fit_ridge(pairs: PairedMoments, ridge: float | None = None) -> Maps:
    """``Linear(in=source, out=target)`` in closed form: source features are taken to where the target's are.

    Minimises ``|XW + b - Y|^2 + l |W|^2`` (Hoerl and Kennard, 1970; b is free) from the moments of the
    pairs. The common space is the target model's own, so that target features stay as they are.

    Args:
        pairs: at least 3.
        ridge: l, in multiples of N times the source's mean variance, so that it has no unit; None: the one
            of `GRID` with the least generalised cross-validation error (`gcv_errors`).

    Returns:
        The maps; ``details`` holds the ridge, the errors of the grid where it was searched, and the share
        of the target's variance that the map explains on the pairs.

    Raises:
        DomainError: fewer than 3 pairs.
    """
    pairs.check_count(3)
    values, vectors, turned = _decompose(pairs)
    unit = float(values.sum()) / len(values)
    details: dict[str, Any] = {}
    if ridge is None:
        errors = gcv_errors(pairs, GRID)
        ridge = GRID[int(torch.tensor(errors, dtype=torch.float64).argmin())]
        details["gcv"] = [list(pair) for pair in zip(GRID, errors)]
    weight = (vectors @ (_inverse(values, ridge * unit)[:, None] * turned)).T
    x_mean, y_mean = pairs.means
    explained = _explained(values, turned, ridge * unit)
    total = float(pairs.scatters[2].trace())
    details |= {"ridge": ridge, "explained": explained / total if total else 1.0, "pairs": pairs.count}
    return Maps(affine(weight, y_mean - weight @ x_mean), None, details)


def gcv_errors(pairs: PairedMoments, ridges: tuple[float, ...]) -> list[float]:
    """The generalised cross-validation error of each ridge: mean over pairs, summed over dimensions.

    ``(RSS / N) / (1 - df / N)^2``: Golub, Heath and Wahba (1979), eq. 1.4, with the trace of the hat matrix
    (the mean counts as one) as df: an approximation of the leave-one-out error that moments suffice for.
    Infinite where df reaches N.

    Args:
        pairs: the moments.
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


def _decompose(pairs: PairedMoments) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (D,) and eigenvectors (D, D) of the source's scatter; its cross-scatter in these axes."""
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
