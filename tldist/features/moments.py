"""Mean and covariance of features in one pass, the same for any split into batches and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tldist.distributed import Team
from tldist.errors import DomainError


@dataclass(frozen=True)
class Moments:
    """First and second moments of vectors, in float64.

    Attributes:
        count: number of vectors.
        mean: float64 (D,).
        scatter: float64 (D, D), the sum of the outer products of deviations from the mean.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def from_batch(cls, features: Tensor | np.ndarray) -> Moments:
        """The moments of one batch (N, D) of any float type, N >= 1."""
        values = torch.as_tensor(features).to(torch.float64)
        mean = values.mean(0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    @property
    def width(self) -> int:
        """D."""
        return len(self.mean)

    @property
    def variance(self) -> Tensor:
        """float64 (D,), unbiased."""
        return self.covariance.diagonal().clone()

    @property
    def covariance(self) -> Tensor:
        """float64 (D, D), unbiased (divided by N - 1).

        Raises:
            DomainError: fewer than two vectors.
        """
        if self.count < 2:
            raise DomainError(f"a covariance needs at least 2 images, found {self.count}.")
        return self.scatter / (self.count - 1)

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together.

        The pairwise update of Chan, Golub and LeVeque (1979), eq. 2.1: unlike a sum of squares it loses
        nothing where the mean is large against the spread.
        """
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = torch.outer(difference, difference) * (self.count * other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)


def merge_moments(parts: Iterable[Moments | None]) -> Moments | None:
    """All parts together, in their order; None where there is none (a process without images).

    Holds two at a time: ``parts`` may be a generator over any number of batches.
    """
    total: Moments | None = None
    for part in parts:
        if part is not None:
            total = part if total is None else total.merge(part)
    return total


def gather_moments(mine: Moments | None, team: Team) -> Moments | None:
    """The moments over all processes, on every one of them; merged by rank, so all get the same bits."""
    return merge_moments(team.gather(mine))
