"""Maximum mean discrepancy between two sets of features, with a mixture of Gaussian kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tldist.features.arrays import Values, as_features, blocks_of_rows, check_widths

FACTORS = (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)
"""Bandwidths as multiples of the median distance; their squares go from a quarter to four, by twos."""

_MEDIAN_ROWS = 500
"""Rows of each set that the median distance is taken over."""


@dataclass(frozen=True)
class LinearEstimate:
    """An average over independent pairs.

    Attributes:
        value: the squared MMD.
        error: its standard error; infinite where there is one pair.
    """

    value: float
    error: float


def median_bandwidth(source: Values, target: Values) -> float:
    """The median distance between points of both sets together: the usual width of a Gaussian kernel.

    Gretton et al. (2012), section 8 (JMLR 13). Taken over at most 500 rows of each set, evenly spread. Where
    more than half of the distances are 0 it is their mean; 1 where all points are one.

    Args:
        source, target: (N, D) and (M, D).
    """
    first, second = _both(source, target)
    points = torch.cat([_spread(first), _spread(second)])
    upper = torch.triu_indices(len(points), len(points), 1)
    distances = _squared_distances(points, points)[upper[0], upper[1]].sqrt()
    return float(distances.quantile(0.5)) or float(distances.mean()) or 1.0


def several_bandwidths(source: Values, target: Values) -> tuple[float, ...]:
    """The median distance times `FACTORS`: several kernels at once, as DAN has them (arXiv:1502.02791)."""
    median = median_bandwidth(source, target)
    return tuple(factor * median for factor in FACTORS)


def squared_mmd(source: Values, target: Values, bandwidths: Sequence[float] | None = None) -> float:
    """The unbiased estimate of the squared MMD in quadratic time; below 0 where the sets hardly differ.

    Gretton et al. (2012), lemma 6 (eq. 3), with the mean of the kernels ``exp(-|x - y|^2 / (2 b^2))``. The
    kernel matrices are made block by block.

    Args:
        source, target: (N, D) and (M, D), at least two rows each.
        bandwidths: b of each kernel; None: `several_bandwidths`.
    """
    first, second = _both(source, target)
    widths = tuple(bandwidths or several_bandwidths(first, second))
    within = sum(_kernel_sum(a, a, widths, skip_self=True) / (len(a) * (len(a) - 1)) for a in (first, second))
    between = _kernel_sum(first, second, widths) / (len(first) * len(second))
    return float(within - 2 * between)


def linear_mmd(
    source: Values, target: Values, bandwidths: Sequence[float] | None = None, *, seed: int = 0
) -> LinearEstimate:
    """The estimate of the squared MMD in linear time, with its standard error.

    Gretton et al. (2012), lemma 14: the mean of ``k(x1, x2) + k(y1, y2) - k(x1, y2) - k(x2, y1)`` over
    disjoint pairs of rows. The pairs are drawn by ``seed``: rows that lie class by class are not independent.

    Args:
        source, target: (N, D) and (M, D), at least two rows each; of the larger set some rows are not used.
        bandwidths: as in `squared_mmd`.
        seed: of the pairs.
    """
    first, second = _both(source, target)
    widths = tuple(bandwidths or several_bandwidths(first, second))
    generator = torch.Generator().manual_seed(seed)
    even = min(len(first), len(second)) // 2 * 2
    x, y = (a[torch.randperm(len(a), generator=generator)[:even].to(a.device)] for a in (first, second))
    x1, x2, y1, y2 = x[::2], x[1::2], y[::2], y[1::2]

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return _kernels((a - b).square().sum(1), widths)

    terms = kernel(x1, x2) + kernel(y1, y2) - kernel(x1, y2) - kernel(x2, y1)
    error = float(terms.std() / len(terms) ** 0.5) if len(terms) > 1 else float("inf")
    return LinearEstimate(float(terms.mean()), error)


def _both(source: Values, target: Values) -> tuple[Tensor, Tensor]:
    """Checked, and moved by one vector so that squared distances lose no digits."""
    first = as_features(source, "the source's features", at_least=2)
    second = as_features(target, "the target's features", at_least=2)
    check_widths(first.shape[1], second.shape[1])
    centre = (first.mean(0) + second.mean(0)) / 2
    return first - centre, second - centre


def _spread(points: Tensor) -> Tensor:
    if len(points) <= _MEDIAN_ROWS:
        return points
    return points[torch.linspace(0, len(points) - 1, _MEDIAN_ROWS).round().long().to(points.device)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(1)[:, None] + b.square().sum(1)[None, :]
    return (squares - 2 * a @ b.T).clamp_min(0)


def _kernels(squared: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """The mean of the kernels at squared distances."""
    total = torch.zeros_like(squared)
    for bandwidth in bandwidths:
        total += torch.exp(squared / (-2 * bandwidth**2))
    return total / len(bandwidths)


def _kernel_sum(a: Tensor, b: Tensor, bandwidths: Sequence[float], skip_self: bool = False) -> float:
    """The sum of the kernel over all pairs; without those of a row with itself, which are 1."""
    total = 0.0
    for rows in blocks_of_rows(len(a), len(b)):
        kernels = _kernels(_squared_distances(a[rows], b), bandwidths)
        if skip_self:
            kernels.diagonal(rows.start).zero_()
        total += float(kernels.sum())
    return total
