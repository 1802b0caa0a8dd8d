"""The rotation between two models' features: orthogonal Procrustes."""

from __future__ import annotations

import torch

from tldist.features.cross_moments import CrossMoments
from tldist.features.heterogeneous.maps import Into, Maps, one_way


def fit_procrustes(pairs: CrossMoments, *, scaling: bool = True, into: Into = "source") -> Maps:
    """The orthogonal map (with one scale) under which one model's features lie nearest to the other's.

    Schönemann (1966): with ``X^T Y = U S V^T`` of centred pairs, ``R = U V^T``. For other widths R is
    semi-orthogonal: into a wider space it is an isometry, and the least-squares solution; into a narrower
    one it is a projection, and has the largest inner product ``tr(R^T X^T Y)``. Directions of which the
    pairs say nothing (zero singular values: fewer pairs than dimensions) are dropped, so that the result is
    unique.

    Args:
        pairs: at least 2.
        scaling: also the one number by which mapped features are multiplied, by least squares.
        into: whose space is the common one: ``source`` maps the target's features, ``target`` the source's.

    Returns:
        The maps; ``details`` holds the scale, the number of directions kept, and the share of the variance
        in the common space that the map explains on the pairs (below 0: it is worse than the mean).

    Raises:
        DomainError: fewer than 2 pairs.
    """
    pairs.check_count(2)
    pairs = pairs if into == "target" else pairs.swapped()
    of_x, cross, of_y = pairs.scatters
    left, singular, right = torch.linalg.svd(cross, full_matrices=False)
    alive = singular > singular[0] * max(cross.shape) * torch.finfo(torch.float64).eps
    rotation = left[:, alive] @ right[alive]  # (D, E)
    agreement = float(singular[alive].sum())
    size = float((rotation * (of_x @ rotation)).sum())
    scale = agreement / size if scaling and size > 0 else 1.0
    total = float(of_y.trace())
    gained = 2 * scale * agreement - scale**2 * size
    details = {
        "into": into,
        "scale": scale,
        "directions": int(alive.sum()),
        "explained": gained / total if total else 1.0,
        "pairs": pairs.count,
    }
    return one_way(scale * rotation.T, pairs, into, details)
