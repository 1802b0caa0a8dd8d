"""Centred kernel alignment (CKA): how alike two layers, of any widths, describe the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features
from tldist.features.moments import Moments

_CONSTANT = 1e-12
"""Deviations below this multiple of the mean are rounding."""


def linear_cka(first: Values, second: Values) -> float:
    """``|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)`` of centred features, from 0 to 1.

    Kornblith et al. (arXiv:1905.00414), section 3. Rotations and one scale of either side change nothing.
    With fewer images than dimensions it comes out too high: see `unbiased_cka`. 0 where one side is constant.

    Args:
        first, second: (N, D) and (N, E), of the same images in the same order.
    """
    x, y = _both(first, second)
    if len(x) < min(x.shape[1], y.shape[1]):  # the Gram matrices are smaller; the same numbers
        return _ratio((x @ x.T * (y @ y.T)).sum(), (x @ x.T).square().sum(), (y @ y.T).square().sum())
    return _ratio((x.T @ y).square().sum(), (x.T @ x).square().sum(), (y.T @ y).square().sum())


def cka_matrix(joint: Moments, widths: Sequence[int]) -> Tensor:
    """Linear CKA between each two of several layers, from one pass over any number of images.

    Args:
        joint: the moments of the layers' features side by side, (N, sum of widths); merged over batches and
            processes as any moments are.
        widths: of the layers, in that order.

    Returns:
        float64 (L, L), symmetric, 1 on the diagonal but for layers that are constant (0).
    """
    if sum(widths) != joint.width:
        raise DomainError(f"the layers' widths sum to {sum(widths)}, but the moments have {joint.width}.")
    blocks = [rows.split(list(widths), dim=1) for rows in joint.scatter.split(list(widths), dim=0)]
    sizes = torch.stack([torch.stack([block.square().sum() for block in row]) for row in blocks])
    sizes = (sizes + sizes.T) / 2  # equal but for rounding
    spreads = joint.scatter.diagonal().split(list(widths))
    means = joint.mean.split(list(widths))
    alive = [
        spread.sum() > joint.count * _CONSTANT**2 * mean.square().sum()
        for spread, mean in zip(spreads, means)
    ]
    own = sizes.diagonal().sqrt() * torch.stack(alive)
    scale = torch.outer(own, own)
    return torch.where(scale > 0, sizes / scale.where(scale > 0, torch.ones_like(scale)), 0.0)


@dataclass(frozen=True)
class CrossSums:
    """The sums that the unbiased HSIC of two linear kernels is made of; those of parts add up.

    Attributes:
        count: images.
        cross: float64 (D, E), of x y^T.
        x, y: float64 (D,) and (E,).
        x_by_y, y_by_x: float64 (D,) and (E,): of x |y|^2 and of y |x|^2.
        squares: float64 (3,): of |x|^2, |y|^2 and |x|^2 |y|^2.
    """

    count: int
    cross: Tensor
    x: Tensor
    y: Tensor
    x_by_y: Tensor
    y_by_x: Tensor
    squares: Tensor

    @classmethod
    def from_batch(cls, x: Values, y: Values) -> CrossSums:
        """Of a batch (N, D) and (N, E).

        The result does not depend on the origin, but loses digits where the features' mean is many times
        their spread: subtract one vector (the mean of the first batch) from all batches then.
        """
        first, second = as_features(x), as_features(y)
        _check_rows(first, second)
        sizes, others = first.square().sum(1), second.square().sum(1)
        squares = torch.stack([sizes.sum(), others.sum(), sizes @ others])
        return cls(
            len(first),
            first.T @ second,
            first.sum(0),
            second.sum(0),
            others @ first,
            sizes @ second,
            squares,
        )

    def merge(self, other: CrossSums) -> CrossSums:
        """The sums over both parts."""
        return CrossSums(
            self.count + other.count,
            self.cross + other.cross,
            self.x + other.x,
            self.y + other.y,
            self.x_by_y + other.x_by_y,
            self.y_by_x + other.y_by_x,
            self.squares + other.squares,
        )

    @property
    def hsic(self) -> float:
        """HSIC_1 of Song et al. (JMLR 13, 2012), eq. 3 of arXiv:2010.15327: unbiased.

        There it is written with N x N kernel matrices; here each of its three terms is written with sums
        over images, so that no such matrix is made.

        Raises:
            DomainError: fewer than four images.
        """
        n = self.count
        if n < 4:
            raise DomainError(f"an unbiased HSIC needs at least 4 images, found {n}.")
        size_x, size_y, both = self.squares
        trace = self.cross.square().sum() - both
        totals = (self.x @ self.x - size_x) * (self.y @ self.y - size_y)
        rows = self.x @ self.cross @ self.y - self.x @ self.x_by_y - self.y @ self.y_by_x + both
        sum_ = trace + totals / ((n - 1) * (n - 2)) - rows * 2 / (n - 2)
        return float(sum_) / (n * (n - 3))


def cka_of_sums(xy: CrossSums, xx: CrossSums, yy: CrossSums) -> float:
    """The unbiased CKA, from the sums of two layers with each other and each with itself.

    About 0 for layers that have nothing in common (a little below by chance), whatever their widths.
    """
    return _ratio(xy.hsic, xx.hsic, yy.hsic)


def unbiased_cka(first: Values, second: Values) -> float:
    """CKA of linear kernels with the unbiased HSIC: right for any number of images from four.

    What Nguyen et al. (arXiv:2010.15327) average over mini-batches, here over all images at once.

    Args:
        first, second: (N, D) and (N, E), of the same images in the same order.
    """
    x, y = _both(first, second)
    return cka_of_sums(CrossSums.from_batch(x, y), CrossSums.from_batch(x, x), CrossSums.from_batch(y, y))


def _both(first: Values, second: Values) -> tuple[Tensor, Tensor]:
    x, y = as_features(first, "the first features"), as_features(second, "the second features")
    _check_rows(x, y)
    return _centred(x), _centred(y)


def _centred(features: Tensor) -> Tensor:
    """Less the mean; exactly 0 in dimensions that are constant up to rounding."""
    mean = features.mean(0)
    centred = features - mean
    return centred * (centred.abs().amax(0) > _CONSTANT * mean.abs())


def _check_rows(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y):
        raise DomainError(f"{len(x)} and {len(y)} rows: both layers must describe the same images.")


def _ratio(xy: Tensor | float, xx: Tensor | float, yy: Tensor | float) -> float:
    if xx <= 0 or yy <= 0:
        return 0.0
    return float(xy) / (float(xx) ** 0.5 * float(yy) ** 0.5)
