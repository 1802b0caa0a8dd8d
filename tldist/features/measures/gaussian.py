"""Distances between two sets of features that need no more than their means and covariances."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.features.arrays import check_widths
from tldist.features.moments import Moments


def coral_distance(source: Moments, target: Moments) -> float:
    """The squared distance of the covariances, ``|C_S - C_T|_F^2 / (4 D^2)``.

    Eq. 1 of Deep CORAL (arXiv:1607.01719). In the fourth power of the features' unit.
    """
    check_widths(source.width, target.width)
    difference = source.covariance - target.covariance
    return float(difference.square().sum()) / (4 * source.width**2)


def frechet_distance(source: Moments, target: Moments) -> float:
    """The squared Frechet distance of two Gaussians with these moments.

    ``|m_S - m_T|^2 + tr(C_S + C_T - 2 (C_S C_T)^(1/2))``: Dowson and Landau (1982); on Inception's
    features the FID of arXiv:1706.08500. In the square of the features' unit; 0 for equal moments. The
    trace of the root is taken as the nuclear norm of ``C_S^(1/2) C_T^(1/2)``, which stays exact where a
    covariance has no full rank.
    """
    check_widths(source.width, target.width)
    means = (source.mean - target.mean).square().sum()
    traces = source.covariance.trace() + target.covariance.trace()
    roots = torch.linalg.svdvals(_root(source.covariance) @ _root(target.covariance)).sum()
    return max(0.0, float(means + traces - 2 * roots))


def pooled_scale(source: Moments, target: Moments) -> float:
    """The root of the mean variance of both sets together, each with half of the weight; 1 where it is 0.

    Features divided by it have no unit, so that distances before and after a map can be compared.
    """
    check_widths(source.width, target.width)
    between = (source.mean - target.mean).square() / 4
    variance = (source.variance + target.variance) / 2 + between
    return float(variance.mean().clamp_min(0).sqrt()) or 1.0


def rescaled(moments: Moments, scale: float) -> Moments:
    """The moments of features divided by ``scale``."""
    return Moments(moments.count, moments.mean / scale, moments.scatter / scale**2)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
