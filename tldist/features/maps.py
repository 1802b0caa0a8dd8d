"""Maps of features that are fitted on their moments: to unit variance, to principal components."""

from __future__ import annotations

import torch

from tldist.features.moments import Moments
from tldist.models.chain import Affine, Scale


def standardizing(moments: Moments, ridge: float) -> Scale:
    """The map to mean 0 and variance 1, dimension by dimension, in float64.

    Args:
        moments: of the features.
        ridge: this multiple of the mean variance is added to the variances, so that dimensions that hardly
            vary in a small sample are not blown up.
    """
    variance = moments.variance.clamp_min(0)
    deviation = (variance + ridge * variance.mean()).sqrt()
    # A dimension that is constant up to rounding says nothing: it is centred, not blown up.
    constant = deviation <= 1e-7 * torch.maximum(moments.mean.abs(), deviation.max())
    scale = Scale(moments.width).double()
    scale.weight = torch.where(constant, torch.ones_like(deviation), 1 / deviation)
    scale.bias = -moments.mean * scale.weight
    return scale


def principal(moments: Moments, count: int) -> Affine:
    """The map to the first principal components, in float64: centred, of falling variance, not rescaled.

    An axis is turned so that its largest component is positive: the same on every machine.

    Args:
        moments: of the features, of width D.
        count: components to keep, at most D.
    """
    axes = torch.linalg.eigh(moments.covariance).eigenvectors.flip(1)[:, :count].T
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    affine = Affine(moments.width, count).double()
    affine.weight = axes * largest.sign()
    affine.bias = -affine.weight @ moments.mean
    return affine
