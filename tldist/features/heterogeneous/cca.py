"""Canonical correlation analysis: both models' features in the space of what they have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.errors import RecipeError
from tldist.features.cross_moments import CrossMoments
from tldist.features.heterogeneous.maps import Maps, affine


def fit_cca(
    pairs: CrossMoments, *, dimensions: int | None = None, ridge: float = 0.0, power: float = 0.0
) -> Maps:
    """Pairs of directions of largest correlation: source and target each get a map into them.

    Hotelling (1936), regularised as by Vinod (1976): the singular value decomposition of
    ``C_xx^(-1/2) C_xy C_yy^(-1/2)``. Mapped features have mean 0, and with ridge=0 variance 1 and no
    correlation but with their partner. The largest component of each source direction is positive.

    Args:
        pairs: at least 3.
        dimensions: of the common space, the most correlated ones; None: as many as there are.
        ridge: this multiple of the mean variance is added to the variances of each side. With fewer pairs
            than dimensions and ridge=0 all correlations are 1, and mean nothing.
        power: both sides are multiplied by the correlations to this power, so that what the models do not
            share weighs little (Gong et al., arXiv:1212.4522, who take 4); 0: not.

    Returns:
        The maps; ``details`` holds the correlations of the kept dimensions (with a ridge they are smaller).

    Raises:
        DomainError: fewer than 3 pairs.
        RecipeError: more dimensions than there are.
    """
    pairs.check_count(3)
    of_x, cross, of_y = pairs.scatters
    scale = pairs.count - 1
    whiten_x, whiten_y = _inverse_root(of_x / scale, ridge), _inverse_root(of_y / scale, ridge)
    left, correlations, right = torch.linalg.svd(whiten_x.T @ (cross / scale) @ whiten_y, full_matrices=False)
    most = len(correlations)
    if dimensions is not None and not 1 <= dimensions <= most:
        raise RecipeError(f"dimensions={dimensions}: the pairs span {most}; give 1 to {most}.")
    kept = slice(dimensions or most)
    correlations = correlations.clamp(0, 1)[kept]
    x_weight, y_weight = (whiten_x @ left[:, kept]).T, (whiten_y @ right[kept].T).T
    weights = _signs(x_weight) * correlations[:, None] ** power
    x_mean, y_mean = pairs.means
    x_weight, y_weight = x_weight * weights, y_weight * weights
    details = {"correlations": correlations.tolist(), "ridge": ridge, "pairs": pairs.count}
    return Maps(affine(x_weight, -x_weight @ x_mean), affine(y_weight, -y_weight @ y_mean), details)


def _inverse_root(covariance: Tensor, ridge: float) -> Tensor:
    """(D, R) with ``W^T (C + ridge) W = I``: directions without variance are dropped."""
    values, vectors = torch.linalg.eigh(covariance)
    alive = values > values[-1].clamp_min(0) * len(values) * torch.finfo(torch.float64).eps
    if not alive.any():
        raise RecipeError("the pairs' features do not vary, so that they have no correlations.")
    extra = ridge * covariance.diagonal().mean()
    return vectors[:, alive] / (values[alive] + extra).sqrt()


def _signs(weight: Tensor) -> Tensor:
    """(K, 1): 1 or -1, so that each row's largest component becomes positive."""
    return weight.gather(1, weight.abs().argmax(1, keepdim=True)).sign()
