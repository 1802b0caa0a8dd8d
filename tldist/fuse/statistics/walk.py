"""The images that statistics are computed from: the same batches for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tldist.data.loader import load_batches
from tldist.data.order import epoch_order
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError
from tldist.progress import progress_bar
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger


@dataclass(frozen=True)
class Walk:
    """Which images are looked at, and how.

    Attributes:
        samples: at most so many images, drawn by the seed; None: all.
        batch_size: images that one process handles at once.
        seed: of the images drawn and of the composition of batches.
        workers: decoding processes.
    """

    samples: int | None = None
    batch_size: int = 64
    seed: int = 0
    workers: int = 0


def walk_batches(size: int, walk: Walk) -> list[np.ndarray]:
    """Positions of a domain of ``size`` images, shuffled, in batches whose sizes differ by one at most."""
    order = epoch_order(walk.seed, 0, size)[: walk.samples]
    return np.array_split(order, max(1, -(-len(order) // walk.batch_size)))


def walk_images(
    how: Preprocessing, domain: Domain, team: Team, ledger: Ledger, walk: Walk, label: str
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """This process's batches; all processes go to the end, where the broken images are settled.

    Whole batches go to processes in turn, so that what is computed from a batch does not depend on their
    number.

    Yields:
        images: uint8 (N, H, W, 3) on the team's device, N >= 1, without the broken ones.
        positions: int64 (N,), theirs in the domain.

    Raises:
        DomainError: too many broken images, or no image at all on any process; the same on every one.
    """
    plans = walk_batches(len(domain), walk)
    seen = 0
    with progress_bar(sum(map(len, plans)), "img", label, keep=False) as bar:
        for batch in load_batches(domain, plans[team.rank :: team.size], how, workers=walk.workers):
            ledger.add(batch.broken)
            bar.update(len(batch.indices) * team.size)
            images = batch.images[batch.valid]
            seen += len(images)
            if len(images):
                yield images.to(team.device), batch.indices[batch.valid].numpy()
    ledger.settle(team)
    if not team.any(seen > 0):
        raise DomainError(f"{domain.name}: no image could be decoded.")


def sum_over(team: Team, tensor: Tensor) -> Tensor:
    """The float64 sum of a tensor over all processes, on the CPU; the tensor may be summed in place."""
    return team.sum(tensor.to(team.device, torch.float64)).cpu()


class ChannelSums:
    """Mean and variance of channels in one pass, the same for any split into batches and processes.

    Args:
        device: where the sums are kept, in float64.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sums = torch.zeros(2, width, dtype=torch.float64, device=device)
        self.count = torch.zeros(1, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add ``values`` (R, C), R >= 1.

        Returns:
            Mean and variance (divided by R) of these values alone, float64 (C,).
        """
        # The variance about the batch's own mean, then widened: squares of raw float32 numbers would lose it
        # where the mean is large.
        variance, mean = (
            part.double() for part in torch.var_mean(values.to(_at_least_float(values)), 0, correction=0)
        )
        self.sums += len(values) * torch.stack([mean, variance + mean**2])
        self.count += len(values)
        return mean, variance

    def over(self, team: Team) -> tuple[int, Tensor, Tensor]:
        """How many values all processes have added, their mean and their variance (divided by the count),
        float64 (C,) on the CPU; called by all processes together."""
        count = float(sum_over(team, self.count.clone()))
        mean, square = sum_over(team, self.sums.clone()) / max(count, 1.0)
        return round(count), mean, (square - mean**2).clamp(min=0)


def _at_least_float(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
