"""Alignments by the principal subspaces of both domains: subspace, gfk."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.align.fit import Data, Fit, choose_dims, two_moments
from tldist.errors import DomainError
from tldist.features.maps import principal_axes
from tldist.features.moments import Moments
from tldist.models.transforms import Affine


def subspace(source: Moments | Data, target: Moments | Data, *, dims: int | None = None) -> Fit:
    """Each domain to its own principal subspace, and the source's basis turned into the target's.

    Subspace alignment, algorithm 1 of Fernando et al. (ICCV 2013): ``S_a = S X_S X_S^T X_T`` and
    ``T_T = T X_T``, of features that are centred in each domain (the paper's are z-scored before: chain
    ``standardize`` in front for that).

    Args:
        source, target: features (N, D), or their moments.
        dims: components of both; None: as many as hold 95 % of the target's variance.
    """
    first, second = two_moments(source, target)
    variances, target_axes = principal_axes(second)
    most = min(first.width, first.count - 1, second.count - 1)
    kept = choose_dims(dims, most, variances)
    source_axes, target_axes = principal_axes(first)[1][:kept], target_axes[:kept]
    weight = target_axes @ source_axes.T @ source_axes
    return Fit(
        Affine.of(weight, -weight @ first.mean),
        Affine.of(target_axes, -target_axes @ second.mean),
        {"dims": kept},
    )


def gfk(source: Moments | Data, target: Moments | Data, *, dims: int | None = None) -> Fit:
    """Features in all subspaces on the way from the source's to the target's at once.

    The geodesic flow kernel of Gong et al. (CVPR 2012), eq. 4 to 6: ``x^T G y`` is the mean of the products
    over the geodesic between the two principal subspaces. ``G`` has rank 2d, so a map to 2d dimensions
    whose products are the kernel's is used in the place of ``G^(1/2)``; it is one for both domains, which
    are centred each by its own mean.

    Args:
        source, target: features (N, D), or their moments.
        dims: d of each subspace, at most D / 2; None: as many as hold 95 % of the target's variance.
    """
    first, second = two_moments(source, target)
    most = min(first.width // 2, first.count - 1, second.count - 1)
    if most < 1:
        raise DomainError("gfk needs features of two dimensions at least.")
    variances, target_axes = principal_axes(second)
    kept = choose_dims(dims, most, variances)
    weight = geodesic_flow(principal_axes(first)[1][:kept], target_axes[:kept])
    start, end = (Affine.of(weight, -weight @ moments.mean) for moments in (first, second))
    return Fit(start, end, {"dims": kept})


def geodesic_flow(source: Tensor, target: Tensor) -> Tensor:
    """A factor F (2d, D) of the geodesic flow kernel, ``F^T F = G``.

    Args:
        source, target: orthonormal rows (d, D), float64: the bases of the subspaces.
    """
    # Principal directions and angles: source^T a_i meets target^T b_i at the angle theta_i.
    left, cosines, right = torch.linalg.svd(source @ target.T)
    start, end = left.T @ source, right @ target
    turn = start.gather(1, start.abs().argmax(1, keepdim=True)).sign()  # the same on every machine
    start, end = start * turn, end * turn
    cosines = cosines.clamp(max=1)
    away = end - cosines[:, None] * start  # what of the end's directions is orthogonal to the start's
    sines = away.norm(dim=1)
    away = away / sines.clamp_min(1e-300)[:, None]
    theta = torch.atan2(sines, cosines)
    # Eq. 6, on the way start cos(t theta) + away sin(t theta), t from 0 to 1; sinc keeps theta = 0 exact.
    double = torch.sinc(2 * theta / torch.pi)
    along, across = (1 + double) / 2, (1 - double) / 2
    mixed = torch.sinc(theta / torch.pi) * theta.sin() / 2
    blocks = torch.stack([torch.stack([along, mixed], 1), torch.stack([mixed, across], 1)], 1)
    values, vectors = torch.linalg.eigh(blocks)  # (d, 2, 2): one for each pair of directions
    roots = vectors * values.clamp_min(0).sqrt()[:, None, :] @ vectors.transpose(1, 2)
    factor = roots @ torch.stack([start, away], 1)
    return factor.reshape(-1, source.shape[1])
