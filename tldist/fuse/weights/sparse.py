"""Merges of task vectors that are thinned out first: by magnitude, or at random.

Arrays are float32 of one shape, possibly a piece of a tensor: what must be known of the whole tensor (the
magnitudes between which entries are kept) comes first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tldist.fuse.weights.linear import Array

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Band:
    """Magnitudes that are kept, both ends included."""

    low: float
    high: float = np.inf


def top_band(model: Array, base: Array, density: float) -> Band:
    """The band that keeps the ``density`` largest changes of a tensor: TIES' trim, arXiv:2306.01708, step 1.

    Args:
        model, base: a whole tensor.
        density: share of entries that stay, 0 .. 1; at least one stays.
    """
    return magnitude_band(model, base, density, 0.0)


def magnitude_band(model: Array, base: Array, density: float, gamma: float) -> Band:
    """The band without the ``gamma`` largest changes and with the next ``density`` of them: Breadcrumbs,
    arXiv:2312.06795, eq. 2 (its beta is 1 - density - gamma).

    Args:
        model, base: a whole tensor.
        density: share of entries that stay, 0 .. 1; at least one stays.
        gamma: share of the largest that go; fewer, where the density would not be reached otherwise.
    """
    size = model.size
    if density >= 1 or size == 0:
        return Band(0.0)
    magnitudes = np.subtract(model.reshape(-1), base.reshape(-1))
    np.abs(magnitudes, out=magnitudes)
    keep = max(1, int(density * size))
    skip = min(int(gamma * size), size - keep)
    low, high = size - keep - skip, size - 1 - skip
    magnitudes.partition((low, high) if skip else low)
    return Band(float(magnitudes[low]), float(magnitudes[high]) if skip else np.inf)


def trimmed(model: Array, base: Array, band: Band) -> Array:
    """The task vector ``model - base`` with the entries outside of the band set to zero."""
    delta = model - base
    magnitudes = np.abs(delta)
    kept = magnitudes >= np.float32(band.low)
    if band.high < np.inf:
        kept &= magnitudes <= np.float32(band.high)
    return delta * kept


def dropped(model: Array, base: Array, mask: Mask, density: float) -> Array:
    """DARE: the task vector with the entries outside of a random mask dropped and the others divided by the
    density, arXiv:2311.03099, eq. 3 (its p is 1 - density)."""
    delta = (model - base) * mask
    delta *= np.float32(1 / density)
    return delta


def random_mask(key: tuple[int, str, int], start: int, shape: tuple[int, ...], density: float) -> Mask:
    """Which entries stay, each with the probability ``density``: a function of the key and the position.

    Args:
        key: seed, name of the tensor, number of the model.
        start: position of the first entry in the flattened tensor; even.
        shape: of the piece.
        density: 0 .. 1.
    """
    count = int(np.prod(shape))
    if density >= 1:
        return np.ones(shape, bool)
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    bits = np.random.PCG64DXSM(int.from_bytes(digest[:16], "little"))
    bits.advance(start // 2)  # 64 bits serve two entries
    draws = np.atleast_1d(bits.random_raw((count + 1) // 2)).view(np.uint32)[:count]
    mask: Mask = (draws < np.uint32(density * 2**32)).reshape(shape)
    return mask


def weighted_sum(deltas: Sequence[Array], base: Array, weights: Sequence[float], scale: float) -> Array:
    """``base + scale * sum_i w_i delta_i``."""
    total = np.float32(weights[0]) * deltas[0]
    for delta, weight in zip(deltas[1:], weights[1:]):
        total += np.float32(weight) * delta
    return base + np.float32(scale) * total


def elected_sum(
    deltas: Sequence[Array], base: Array, weights: Sequence[float], scale: float, *, mean: bool
) -> Array:
    """``base + scale *`` the sum (or mean) of the weighted changes that have the elected sign: steps 2 and 3
    of TIES, arXiv:2306.01708.

    Args:
        deltas: one a model; zeros take no part.
        base: what they are added to.
        weights: one a model.
        scale: the paper's lambda.
        mean: divide by the weights of those that took part (TIES); else the sum (DARE with TIES' election).
    """
    above, below = np.zeros_like(base), np.zeros_like(base)  # twice the sums of what is above and below zero
    sides = (np.zeros_like(base), np.zeros_like(base))  # the weights of what is
    for delta, weight in zip(deltas, weights):
        part = np.float32(weight) * delta
        size = np.abs(part)
        above += part + size
        below += part - size
        if mean:
            sides[0][...] += (part > 0) * np.float32(weight)
            sides[1][...] += (part < 0) * np.float32(weight)
    positive = above >= -below
    total = above * positive
    total += below * ~positive
    if mean:
        share = sides[0] * positive
        share += sides[1] * ~positive
        share += share == 0
        total /= share
    total *= np.float32(scale / 2)
    total += base
    return total
