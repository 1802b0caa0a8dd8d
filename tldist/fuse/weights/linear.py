"""Merges that are one linear combination of the models' tensors, with coefficients of each tensor's own.

Legend: m models, w weights, G the (m, m) Gram matrix of a tensor's models. Arrays are float32 of one shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Matrix = NDArray[np.float64]

_PIECE = 1 << 17
_PARALLEL = 0.9995
"""Cosine above which two tensors are taken as parallel, and the arc between them as a line."""
_KARCHER_STEPS = 100
_KARCHER_PRECISION = 1e-13


def average(models: Sequence[Array], shares: Sequence[float]) -> Array:
    """``sum_i shares_i * models_i``: the uniform (or weighted) model soup of arXiv:2203.05482.

    Computed as ``m_0 + sum_i shares_i * (m_i - m_0)``, which gives equal models back to the last bit.

    Args:
        models: m arrays.
        shares: m numbers of sum 1.
    """
    result = models[0].copy()
    for model, share in zip(models[1:], shares[1:]):
        result += np.float32(share) * (model - models[0])
    return result


def wise_ft(models: Sequence[Array], base: Array, shares: Sequence[float], alpha: float) -> Array:
    """``(1 - alpha) * base + alpha * fine-tuned``, eq. 1 of arXiv:2109.01903; of several, their average."""
    tuned = average(models, shares)
    way = tuned - base
    # From the nearer end: at both of them the model is that end's, to the last bit.
    return base + np.float32(alpha) * way if alpha < 0.5 else tuned - np.float32(1 - alpha) * way


def task_arithmetic(models: Sequence[Array], base: Array, coefficients: Sequence[float]) -> Array:
    """``base + sum_i coefficients_i * (m_i - base)``: task vectors added up, arXiv:2212.04089, section 2.

    With coefficients learned a layer this is AdaMerging's merge, eq. 5 of arXiv:2310.02575.
    """
    result = base.copy()
    for model, coefficient in zip(models, coefficients):
        result += np.float32(coefficient) * (model - base)
    return result


def combination(
    models: Sequence[Array], base: Array | None, coefficients: Sequence[float], base_coefficient: float
) -> Array:
    """``base_coefficient * base + sum_i coefficients_i * m_i``; without a base its term is left out."""
    result = np.float32(coefficients[0]) * models[0]
    for model, coefficient in zip(models[1:], coefficients[1:]):
        result += np.float32(coefficient) * model
    if base is not None and base_coefficient:
        result += np.float32(base_coefficient) * base
    return result


def gram(models: Sequence[Array], origin: Array | None) -> Matrix:
    """Inner products of tensors, seen from an origin: ``G_ij = <m_i - origin, m_j - origin>`` in float64.

    Args:
        models: m arrays.
        origin: an array; None: zero.

    Returns:
        float64 (m, m).
    """
    flat = [model.reshape(-1) for model in models]
    total = np.zeros((len(models), len(models)))
    for start in range(0, flat[0].size, _PIECE):
        part = slice(start, start + _PIECE)
        rows = np.stack([model[part] for model in flat]).astype(np.float64)
        if origin is not None:
            rows -= origin.reshape(-1)[part]
        total += rows @ rows.T
    return total


def slerp_coefficients(inner: Matrix, alpha: float) -> tuple[float, float]:
    """Spherical linear interpolation between two tensors (Shoemake, SIGGRAPH 1985).

    ``sin((1-a) theta)/sin(theta) * m_0 + sin(a theta)/sin(theta) * m_1``, theta the angle between them. Where
    they are parallel (or opposite), or one is zero, a straight line.

    Args:
        inner: the Gram matrix (2, 2).
        alpha: 0 is the first, 1 the second.
    """
    norms = np.sqrt(np.diag(inner))
    cosine = float(inner[0, 1] / (norms[0] * norms[1])) if norms.min() > 0 else 1.0
    if abs(cosine) > _PARALLEL:
        return 1 - alpha, alpha
    theta = np.arccos(cosine)
    sine = np.sin(theta)
    return float(np.sin((1 - alpha) * theta) / sine), float(np.sin(alpha * theta) / sine)


def multi_slerp_coefficients(inner: Matrix, shares: Sequence[float]) -> tuple[float, ...]:
    """SLERP of any number of tensors: the spherical weighted mean of their directions (Buss and Fillmore,
    ACM Transactions on Graphics 20(2), 2001, algorithm A1), with the weighted mean of their lengths.

    For two tensors the direction is SLERP's. The mean lies in the models' span, so that their Gram matrix is
    all that the iteration needs.

    Args:
        inner: the Gram matrix (m, m).
        shares: m numbers of sum 1.

    Returns:
        One coefficient a model.
    """
    norms, weights = np.sqrt(np.diag(inner)), np.asarray(shares)
    if norms.min() == 0:  # a direction is missing: a straight line
        return tuple(shares)
    cosines = inner / np.outer(norms, norms)
    mean = weights / np.sqrt(max(weights @ cosines @ weights, 1e-30))  # coefficients of the unit directions
    for _ in range(_KARCHER_STEPS):
        towards = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(towards)
        stretch = np.divide(angles, np.sin(angles), out=np.ones_like(angles), where=np.sin(angles) > 1e-9)
        step = weights * stretch  # of the logarithm: stretch_i * (u_i - towards_i * mean)
        tangent = step - (step @ towards) * mean
        length = np.sqrt(max(tangent @ cosines @ tangent, 0.0))
        if length < _KARCHER_PRECISION:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * tangent
        mean /= np.sqrt(max(mean @ cosines @ mean, 1e-30))
    return tuple((weights @ norms * mean / norms).tolist())


def model_stock_ratio(inner: Matrix) -> float:
    """How far Model Stock goes from the base to the average: arXiv:2403.19522, eq. 5 (two models) and its
    extension to m: ``t = m cos / (1 + (m - 1) cos)``.

    Args:
        inner: the Gram matrix of ``m_i - base``, (m, m), m at least 2.

    Returns:
        t, from the mean cosine of the pairs; 0 where nothing was learned, or the models oppose each other.
    """
    count = len(inner)
    norms = np.sqrt(np.diag(inner))
    pairs = np.triu_indices(count, 1)
    lengths = np.outer(norms, norms)[pairs]
    cosines = np.divide(inner[pairs], lengths, out=np.zeros_like(lengths), where=lengths > 0)
    cosine = float(np.clip(cosines, -1, 1).mean())
    denominator = 1 + (count - 1) * cosine
    return count * cosine / denominator if denominator > 1e-6 else 0.0
