"""Mean and covariance of features in one pass, the same for any split into batches and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.blas import dsyr, dsyrk
from torch import Tensor

from tldist.distributed import Team
from tldist.errors import DomainError

_BLOCK_BYTES = 2**21
"""Of float64 rows that are centred at once: they stay in the processor's cache until they are multiplied."""
_FEW_ROWS = 1024
"""Smaller batches are put together first: a product of few rows costs more than it computes."""


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
        running = RunningMoments()
        running.add(features)
        return running.moments()

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

    def part(self, start: int, stop: int) -> Moments:
        """The moments of the dimensions ``start`` .. ``stop - 1``."""
        return Moments(self.count, self.mean[start:stop], self.scatter[start:stop, start:stop])


class RunningMoments:
    """Moments that grow by batches, in place.

    A batch costs about one float64 ``dsyrk`` (half of a product of matrices: the result is symmetric), and
    the pairwise update one ``dsyr``.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = np.zeros(0)
        self._lower = np.zeros((0, 0))  # in columns, as BLAS has it, which then writes in place

    def add(self, features: Tensor | np.ndarray) -> None:
        """Take a batch (N, D) of any float type.

        Raises:
            DomainError: it is no matrix, or of another width than those before.
        """
        values = as_rows(features)
        if len(values) == 0:
            return
        if self.count == 0:
            width = values.shape[1]
            self._mean, self._lower = np.zeros(width), np.zeros((width, width), order="F")
        if values.shape[1] != len(self._mean):
            raise DomainError(f"features of width {values.shape[1]} among others of {len(self._mean)}.")
        mean = values.mean(0, dtype=np.float64)
        size = max(1, _BLOCK_BYTES // (8 * values.shape[1]))
        centred = np.empty((min(size, len(values)), values.shape[1]))
        for start in range(0, len(values), size):
            rows = values[start : start + size]
            np.subtract(rows, mean, out=centred[: len(rows)])
            dsyrk(1.0, centred[: len(rows)].T, beta=1.0, c=self._lower, overwrite_c=1, lower=1)
        self._update_mean(mean, len(values))

    def _update_mean(self, mean: np.ndarray, added: int) -> None:
        """Chan, Golub and LeVeque (1979), eq. 2.1, as in `Moments.merge`."""
        count = self.count + added
        difference = mean - self._mean
        if self.count:
            dsyr(self.count * added / count, difference, a=self._lower, overwrite_a=1, lower=1)
        self._mean = self._mean + difference * (added / count)
        self.count = count

    def moments(self) -> Moments:
        """What there is so far; at least one vector."""
        assert self.count, "moments of nothing"
        scatter = np.tril(self._lower) + np.tril(self._lower, -1).T
        return Moments(self.count, torch.from_numpy(self._mean.copy()), torch.from_numpy(scatter))


def as_rows(features: Tensor | np.ndarray) -> np.ndarray:
    """Features as a matrix of NumPy's (N, D), in float32 where they are, else in float64; not copied if so.

    Raises:
        DomainError: they have another number of dimensions than two, or are not numbers.
    """
    if isinstance(features, Tensor):
        found = features.detach().cpu()
        values = (found if found.dtype in (torch.float32, torch.float64) else found.double()).numpy()
    else:
        values = np.asarray(features)
        if values.dtype.kind not in "fiub":
            raise DomainError(f"features are numbers, found an array of {values.dtype}.")
        if values.dtype not in (np.float32, np.float64):
            values = values.astype(np.float64)
    if values.ndim != 2:
        raise DomainError(f"features are a matrix (samples, dimensions), found the shape {values.shape}.")
    return values


def moments_of(batches: Iterable[Tensor | np.ndarray]) -> Moments | None:
    """The moments of any number of batches, in bounded memory; None where there is no vector."""
    running = RunningMoments()
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(as_rows(batch))
        if sum(map(len, waiting)) >= _FEW_ROWS:
            running.add(waiting[0] if len(waiting) == 1 else np.concatenate(waiting))
            waiting = []
    if waiting:
        running.add(np.concatenate(waiting))
    return running.moments() if running.count else None


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
    """The moments over all processes, on every one of them, to the same bits.

    Two all-reductions, of the means and of the scatters about the common mean: no process holds more than
    one matrix beside its own, however many there are.
    """
    if team.size == 1:
        return mine
    widths = {width for width in team.gather(mine.width if mine else 0) if width}
    if not widths:
        return None
    if len(widths) > 1:
        raise DomainError(f"features of other widths in other processes: {sorted(widths)}.")
    width = widths.pop()
    mine = mine or Moments(0, torch.zeros(width).double(), torch.zeros(width, width).double())
    sums = torch.cat([mine.mean * mine.count, torch.tensor([float(mine.count)]).double()])
    sums = team.sum(sums.to(team.device)).cpu()
    count = round(float(sums[-1]))
    mean = sums[:-1] / count
    difference = mine.mean - mean
    scatter = mine.scatter + torch.outer(difference, difference) * mine.count
    return Moments(count, mean, team.sum(scatter.to(team.device)).cpu())
