"""Moments of pairs of vectors: what a regression of one space on another needs, in one pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tldist.distributed import Team
from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features
from tldist.features.moments import Moments, as_rows, gather_moments, moments_of


@dataclass(frozen=True)
class CrossMoments:
    """First and second moments of pairs of vectors: what a regression of one on the other needs.

    Attributes:
        joint: of the pairs, each as one vector of width D1 + D2.
        split: D1.
    """

    joint: Moments
    split: int

    @classmethod
    def from_batch(cls, first: Values, second: Values) -> CrossMoments:
        """The moments of one batch of pairs, (N, D1) of the source's and (N, D2) of the target's, N >= 1.

        Raises:
            DomainError: they are not equally many, or numbers are not finite.
        """
        pairs = as_features(first, "the source's features"), as_features(second, "the target's features")
        found = cross_moments_of([pairs])
        assert found is not None, "moments of nothing"
        return found

    @property
    def first(self) -> Moments:
        """Of the first vectors."""
        return self.joint.part(0, self.split)

    @property
    def second(self) -> Moments:
        """Of the second vectors."""
        return self.joint.part(self.split, self.joint.width)

    @property
    def cross(self) -> Tensor:
        """float64 (D1, D2), the sum of the outer products of deviations: first by second."""
        return self.joint.scatter[: self.split, self.split :]

    @property
    def cross_covariance(self) -> Tensor:
        """float64 (D1, D2), unbiased (divided by N - 1).

        Raises:
            DomainError: fewer than two pairs.
        """
        return self.joint.covariance[: self.split, self.split :]

    @property
    def count(self) -> int:
        """N."""
        return self.joint.count

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """float64 (D1,) and (D2,)."""
        return self.joint.mean[: self.split], self.joint.mean[self.split :]

    @property
    def scatters(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 (D1, D1), (D1, D2), (D2, D2): sums of xx^T, xy^T, yy^T of deviations from the means."""
        return self.first.scatter, self.cross, self.second.scatter

    def swapped(self) -> CrossMoments:
        """The moments of the pairs (second, first)."""
        order = torch.arange(self.joint.width).roll(-self.split).to(self.joint.mean.device)
        joint = Moments(self.count, self.joint.mean[order], self.joint.scatter[order][:, order])
        return CrossMoments(joint, self.joint.width - self.split)

    def check_count(self, least: int) -> None:
        """Refuse fewer pairs than ``least``.

        Raises:
            DomainError: there are fewer.
        """
        if self.count < least:
            raise DomainError(f"{self.count} pairs, expected at least {least} to fit a map between features.")

    def merge(self, other: CrossMoments) -> CrossMoments:
        """The moments of both sets of pairs together."""
        return CrossMoments(self.joint.merge(other.joint), self.split)


def cross_moments_of(
    batches: Iterable[tuple[Tensor | np.ndarray, Tensor | np.ndarray]],
) -> CrossMoments | None:
    """The moments of any number of batches of pairs, in bounded memory; None where there is no pair.

    Raises:
        DomainError: a batch has not as many first as second vectors.
    """
    split = 0

    def joined() -> Iterable[np.ndarray]:
        nonlocal split
        for first, second in batches:
            left, right = as_rows(first), as_rows(second)
            if len(left) != len(right):
                raise DomainError(f"pairs need as many of both, found {len(left)} and {len(right)}.")
            split = left.shape[1]
            yield np.concatenate([left, right], 1)

    joint = moments_of(joined())
    return None if joint is None else CrossMoments(joint, split)


def gather_cross_moments(mine: CrossMoments | None, team: Team) -> CrossMoments | None:
    """The moments of pairs over all processes, on every one of them, to the same bits."""
    splits = [split for split in team.gather(mine.split if mine else None) if split is not None]
    joint = gather_moments(mine.joint if mine else None, team)
    return None if joint is None else CrossMoments(joint, splits[0])
