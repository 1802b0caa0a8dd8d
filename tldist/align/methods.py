"""Alignments: pure functions from the moments of two domains to the maps that bring them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tldist.features.maps import standardizing
from tldist.features.moments import Moments
from tldist.models.chain import Affine, Transform


@dataclass(frozen=True)
class Fit:
    """Maps into the common space, in float64; None leaves features as they are.

    Attributes:
        source: what source features pass through before the head is refitted on them.
        target: what target features pass through; it becomes part of the model.
    """

    source: Transform | None
    target: Transform | None


@dataclass(frozen=True)
class Method:
    """One alignment.

    Attributes:
        fit: (source, target, ridge) to the maps.
        ridge: the strength of its regularisation where none is asked for.
        uses_covariance: whether it reads more of the moments than means and variances.
    """

    fit: Callable[[Moments, Moments, float], Fit]
    ridge: float = 1.0
    uses_covariance: bool = True


def standardize(source: Moments, target: Moments, ridge: float = 0.01) -> Fit:
    """Each domain to mean 0 and variance 1, dimension by dimension.

    What AdaBN (arXiv:1603.04779) does with means and variances inside of a network, on its features. As
    there, something small is added to the variances: ``ridge`` times the domain's mean variance, so that
    dimensions that hardly vary in a small sample are not blown up.
    """
    return Fit(standardizing(source, ridge), standardizing(target, ridge))


def coral(source: Moments, target: Moments, ridge: float = 1.0) -> Fit:
    """Give the source the target's covariance: whiten, then re-colour. Target features stay as they are.

    CORAL, algorithm 1 of arXiv:1511.05547: ``D_S C_S^(-1/2) C_T^(1/2)`` with ``C = cov(D) + I``. Two things
    are ours: the means are matched too (the paper's inputs are standardised before), and the identity is
    scaled by ``ridge`` times the domain's own mean variance, so that the result does not depend on the
    unit of the features; on standardised features ridge=1 is the paper's. With ridge=0 directions without
    variance in the source are dropped.
    """
    whiten = _power(_regularised(source, ridge), -0.5)
    colour = _power(_regularised(target, ridge), 0.5)
    weight = colour @ whiten  # for column vectors; the paper's rows are multiplied from the right
    return Fit(_affine(weight, target.mean - weight @ source.mean), None)


METHODS: dict[str, Method] = {
    "standardize": Method(standardize, ridge=0.01, uses_covariance=False),
    "coral": Method(coral, ridge=1.0),
}
"""The family of homogeneous alignments, by the name that ``method=`` takes."""


def _affine(weight: Tensor, bias: Tensor) -> Affine:
    affine = Affine(weight.shape[1], weight.shape[0]).double()
    affine.weight, affine.bias = weight, bias
    return affine


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
