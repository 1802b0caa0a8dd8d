"""Whether embeddings keep their neighbours: what a search on them would find. NumPy alone."""

from __future__ import annotations

import numpy as np

MOST = 10
"""Neighbours that are compared."""
_TIE = 1e-6
"""Cosines that differ by less are equal: float32 vectors say no more."""


def shared_neighbours(expected: np.ndarray, found: np.ndarray, k: int) -> float:
    """Share of the ``k`` nearest neighbours by cosine that are the same, the mean over all samples.

    A neighbour that is found counts if PyTorch puts it as near as its own k-th one, so that ties cost
    nothing.

    Args:
        expected: (N, D), of PyTorch.
        found: (N, D), of the package.
        k: less than N.
    """
    theirs, ours = _cosines(expected), _cosines(found)
    kth = -np.sort(-theirs, axis=1)[:, k - 1]
    nearest = np.argsort(-ours, axis=1, kind="stable")[:, :k]
    near_enough = np.take_along_axis(theirs, nearest, axis=1) >= kth[:, None] - _TIE
    return float(near_enough.mean())


def neighbours_of(count: int) -> int | None:
    """How many neighbours ``count`` samples can be compared by; None: too few to mean anything.

    Of fewer than twice as many others, half would be shared by chance.
    """
    return MOST if count > 2 * MOST else None


def _cosines(vectors: np.ndarray) -> np.ndarray:
    """(N, N) between the rows of (N, D), in float64; nobody is a neighbour of itself."""
    values = vectors.astype(np.float64)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True).clip(np.finfo(np.float64).tiny)
    cosines: np.ndarray = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    return cosines
