"""Averages of models by the statistics of their layers: pure functions on NumPy arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_NOTHING = 1e-30
_RANK = 1e-6
"""Below this share of the largest, a direction that inputs take is rounding: they were summed in float32."""


def plain_average(models: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """``sum_i shares_i * models_i / sum_i shares_i``, float64."""
    first = np.asarray(models[0], np.float64)  # deviations from it, so that equal models give themselves
    others = sum(share * (np.asarray(model, np.float64) - first) for share, model in zip(shares, models))
    return np.asarray(first + others / sum(shares))


def fisher_average(
    models: Sequence[np.ndarray],
    fishers: Sequence[np.ndarray],
    shares: Sequence[float],
    *,
    nothing: float = _NOTHING,
) -> np.ndarray:
    """``sum_i s_i F_i theta_i / sum_i s_i F_i``: Fisher merging, arXiv:2111.09832.

    Elementwise: it can be computed piece by piece.

    Args:
        models: arrays of one shape, one a model.
        fishers: the diagonal of each one's Fisher information, of that shape, not negative.
        shares: one number a model, not negative, of sum > 0.
        nothing: up to this denominator a parameter matters to no model, and the plain average is taken.

    Returns:
        float64, of that shape.
    """
    plain = plain_average(models, shares)
    parts = [share * np.asarray(fisher, np.float64) for share, fisher in zip(shares, fishers)]
    total = np.asarray(sum(parts))
    matters = total > nothing
    pull = np.asarray(sum(part * (np.asarray(model) - plain) for part, model in zip(parts, models)))
    return np.where(matters, plain + pull / np.where(matters, total, 1.0), plain)


def regmean(
    weights: Sequence[np.ndarray],
    grams: Sequence[np.ndarray],
    shares: Sequence[float],
    reduce: float = 0.9,
) -> np.ndarray:
    """``(sum_i s_i G_i)^-1 sum_i s_i G_i W_i``, eq. 2 of arXiv:2212.09849, for W as (inputs, outputs).

    The merged layer whose outputs are nearest to those of all layers, each on its own inputs, by least
    squares. Where inputs leave it open (some are always 0, or depend on one another), it stays at the plain
    average.

    Args:
        weights: (O, ...) as the layer has them, one a model: (O, D), or (O, C / groups, k, k).
        grams: inner products of the inputs divided by their number, (D, D), or (groups, D, D) of a layer
            with groups; D = C / groups * k * k.
        shares: one number a model, not negative, of sum > 0.
        reduce: factor of what is not on the diagonal, 0 .. 1 (alpha there): 1 is the least-squares
            solution of these inputs, 0 an average weighted by each input's power.

    Returns:
        float64, of the weights' shape.
    """
    shape, depth = weights[0].shape, grams[0].shape[-1]
    groups = grams[0].shape[0] if grams[0].ndim == 3 else 1
    blocks = [np.asarray(weight, np.float64).reshape(groups, -1, depth) for weight in weights]
    matrices = [np.asarray(gram, np.float64).reshape(groups, depth, depth) for gram in grams]
    merged = [
        _merge_block([block[g] for block in blocks], [matrix[g] for matrix in matrices], shares, reduce)
        for g in range(groups)
    ]
    return np.stack(merged).reshape(shape)


def _merge_block(
    weights: list[np.ndarray], grams: list[np.ndarray], shares: Sequence[float], reduce: float
) -> np.ndarray:
    """One group: (O, D) weights, (D, D) matrices."""
    plain = plain_average(weights, shares)
    total, pull = np.zeros_like(grams[0]), np.zeros_like(plain)
    for weight, gram, share in zip(weights, grams, shares):
        part = share * reduce * gram
        np.fill_diagonal(part, share * np.diagonal(gram))
        total += part
        pull += (weight - plain) @ part
    power = np.diagonal(total)
    alive = power > np.finfo(np.float64).eps * power.max(initial=0.0)
    if not alive.any():
        return plain
    unit = 1 / np.sqrt(power[alive])
    scaled = total[np.ix_(alive, alive)] * unit[:, None] * unit
    plain[:, alive] += _solve(scaled, (pull[:, alive] * unit).T).T * unit
    return plain


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """``matrix^-1 right`` for a positive matrix with ones on its diagonal; the shortest of the solutions
    where it is singular."""
    from scipy.linalg import LinAlgError, cho_factor, cho_solve  # a tenth of a second that few merges need

    try:
        factor = cho_factor(matrix, lower=True)
        if np.diagonal(factor[0]).min() ** 2 > _RANK:
            return np.asarray(cho_solve(factor, right))
    except LinAlgError:
        pass  # not positive: singular but for rounding
    values, vectors = np.linalg.eigh(matrix)
    kept = values > _RANK * values[-1]
    return np.asarray(vectors[:, kept] @ ((vectors[:, kept].T @ right) / values[kept, None]))
