"""Maps of features that are fitted on their moments: to unit variance, to principal components."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.features.moments import Moments
from tldist.models.transforms import Affine, Scale


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


def principal_axes(moments: Moments) -> tuple[Tensor, Tensor]:
    """Variances (D,), falling, and the axes (D, D) along which features have them, one a row, in float64.

    An axis is turned so that its largest component is positive: the same on every machine.
    """
    values, vectors = torch.linalg.eigh(moments.covariance)
    return values.flip(0), turned(vectors.T.flip(0))


def principal(moments: Moments, count: int) -> Affine:
    """The map to the first principal components, in float64: centred, of falling variance, not rescaled.

    Args:
        moments: of the features, of width D.
        count: components to keep, at most D.
    """
    axes = principal_axes(moments)[1][:count]
    return Affine.of(axes, -axes @ moments.mean)


def turned(axes: Tensor) -> Tensor:
    """Rows (d, D), each with its largest component positive."""
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    return axes * torch.where(largest < 0, -1.0, 1.0)
