"""Alignments by means and covariances: standardize, pca, whiten, coral, monge."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.align.fit import Data, Fit, check_dims, choose_dims, two_moments
from tldist.errors import RecipeError
from tldist.features.maps import principal, principal_axes, standardizing
from tldist.features.moments import Moments
from tldist.models.transforms import Affine


def standardize(source: Moments | Data, target: Moments | Data, *, ridge: float = 0.01) -> Fit:
    """Each domain to mean 0 and variance 1, dimension by dimension.

    What AdaBN (arXiv:1603.04779) does with means and variances inside of a network, on its features. As
    there, something small is added to the variances: ``ridge`` times the domain's mean variance, so that
    dimensions that hardly vary in a small sample are not blown up.
    """
    first, second = two_moments(source, target)
    return Fit(standardizing(first, ridge), standardizing(second, ridge))


def pca(source: Moments | Data, target: Moments | Data, *, dims: int | None = None) -> Fit:
    """Both domains to the principal components of all samples together: the same map for both.

    It brings nothing closer by itself; it drops the directions in which nothing varies.

    Args:
        source, target: features (N, D), or their moments.
        dims: components to keep; None: as many as hold 95 % of the variance.
    """
    pooled = _pooled(source, target)
    variances, _ = principal_axes(pooled)
    kept = choose_dims(dims, pooled.width, variances)
    affine = principal(pooled, kept)
    return Fit(affine, affine, {"dims": kept})


def whiten(
    source: Moments | Data,
    target: Moments | Data,
    *,
    kind: str = "zca",
    dims: int | None = None,
    ridge: float = 0.01,
) -> Fit:
    """Each domain to mean 0 and the identity as its covariance.

    Args:
        source, target: features (N, D), or their moments.
        kind: ``zca``, ``C^(-1/2)``: of all whitenings the one that moves features least, so that the
            domains' dimensions go on meaning the same (Kessy et al., arXiv:1512.00809, eq. 11); or ``pca``,
            each domain to its own principal axes in the order of their variances, the target's turned to
            the side of the source's.
        dims: first to so many principal components, for zca of all samples together, for pca of each
            domain; None: all.
        ridge: times the domain's mean variance is added to its covariance.
    """
    first, second = two_moments(source, target)
    if kind == "pca":
        kept = check_dims(first.width if dims is None else dims, first.width)
        axes = principal_axes(first)[1][:kept]
        other = principal_axes(second)[1][:kept]
        side = (axes * other).sum(1).sign()
        other = other * torch.where(side == 0, torch.ones_like(side), side)[:, None]
        return Fit(_scaled(first, axes, ridge), _scaled(second, other, ridge), {"dims": kept})
    if kind != "zca":
        raise RecipeError(f"kind={kind}: whiten has zca and pca.")
    if dims is None:
        return Fit(_zca(first, ridge), _zca(second, ridge), {"dims": first.width})
    axes = principal(_pooled(first, second), check_dims(dims, first.width)).weight
    inner, outer = (_zca(projected(moments, axes), ridge) for moments in (first, second))
    maps = (Affine.of(inner.weight @ axes, inner.bias), Affine.of(outer.weight @ axes, outer.bias))
    return Fit(maps[0], maps[1], {"dims": dims})


def coral(source: Moments | Data, target: Moments | Data, *, ridge: float = 1.0) -> Fit:
    """Give the source the target's covariance: whiten, then re-colour. Target features stay as they are.

    CORAL, algorithm 1 of arXiv:1511.05547: ``D_S C_S^(-1/2) C_T^(1/2)`` with ``C = cov(D) + I``. Two things
    are ours: the means are matched too (the paper's inputs are standardised before), and the identity is
    scaled by ``ridge`` times the domain's own mean variance, so that the result does not depend on the
    unit of the features; on standardised features ridge=1 is the paper's. With ridge=0 directions without
    variance in the source are dropped.

    SKADA's ``reg=s`` (shrinkage) is ``ridge = s / (1 - s)``; it divides covariances by N and not by N - 1,
    and moves both domains to the mean 0. ADAPT's ``lambda_`` is ``ridge`` times the mean variance; it
    leaves the means as they are.
    """
    first, second = two_moments(source, target)
    weight = _power(_regularised(second, ridge), 0.5) @ _power(_regularised(first, ridge), -0.5)
    return Fit(Affine.of(weight, second.mean - weight @ first.mean), None)


def monge(source: Moments | Data, target: Moments | Data, *, ridge: float = 0.01) -> Fit:
    """Move the source as little as can be so that it has the target's mean and covariance.

    The optimal transport map between Gaussians (eq. 2 of Flamary et al., arXiv:1905.10155):
    ``A = C_S^(-1/2) (C_S^(1/2) C_T C_S^(1/2))^(1/2) C_S^(-1/2)``. Target features stay as they are. To the
    covariances ``ridge`` times the domain's mean variance is added; POT's ``reg`` is an absolute number,
    and it divides covariances by N.
    """
    first, second = two_moments(source, target)
    own, other = _regularised(first, ridge), _regularised(second, ridge)
    root, inverse = _power(own, 0.5), _power(own, -0.5)
    weight = inverse @ _power(root @ other @ root, 0.5) @ inverse
    return Fit(Affine.of(weight, second.mean - weight @ first.mean), None)


def projected(moments: Moments, axes: Tensor) -> Moments:
    """The moments of features after a linear map ``axes`` (d, D)."""
    return Moments(moments.count, axes @ moments.mean, axes @ moments.scatter @ axes.T)


def _pooled(source: Moments | Data, target: Moments | Data) -> Moments:
    first, second = two_moments(source, target)
    return first.merge(second)


def _zca(moments: Moments, ridge: float) -> Affine:
    weight = _power(_regularised(moments, ridge), -0.5)
    return Affine.of(weight, -weight @ moments.mean)


def _scaled(moments: Moments, axes: Tensor, ridge: float) -> Affine:
    """To the axes (d, D), with variance 1 along each."""
    spread = (axes @ _regularised(moments, ridge) * axes).sum(1)
    alive = spread > spread.max() * len(spread) * torch.finfo(torch.float64).eps
    factors = torch.where(alive, spread.clamp_min(1e-300) ** -0.5, torch.zeros_like(spread))
    weight = axes * factors[:, None]
    return Affine.of(weight, -weight @ moments.mean)


def _regularised(moments: Moments, ridge: float) -> Tensor:
    covariance = moments.covariance
    extra = ridge * covariance.diagonal().mean()
    return covariance + extra * torch.eye(moments.width, dtype=torch.float64)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive semi-definite matrix; null directions stay null."""
    values, vectors = torch.linalg.eigh(matrix)
    alive = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    powers = torch.where(alive, values, torch.ones_like(values)) ** exponent
    return (vectors * (powers * alive)) @ vectors.T
