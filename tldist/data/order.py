"""Data order: a function of (seed, epoch, position), never of the number of processes or of interruptions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on all parts, in order."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """A permutation of 0 .. size - 1, int64, for one epoch."""
    return np.random.Generator(np.random.PCG64(seed_of("order", seed, epoch))).permutation(size)


@dataclass(frozen=True)
class StepPlan:
    """One process's part of one optimiser step.

    Attributes:
        step: counted over the whole run, from 0.
        epoch: from 0.
        total: samples of this step over all processes.
        indices: this process's samples, in order; may be empty in the last step of an epoch.
    """

    step: int
    epoch: int
    total: int
    indices: np.ndarray


def steps_per_epoch(size: int, batch_size: int) -> int:
    """Steps of one epoch; the last one may be smaller."""
    return -(-size // batch_size)


def share(batch: np.ndarray, rank: int, size: int) -> np.ndarray:
    """One process's contiguous part of a batch; parts differ by one sample at most."""
    cut = np.linspace(0, len(batch), size + 1).round().astype(int)
    return batch[cut[rank] : cut[rank + 1]]


def plan_steps(
    *, size: int, batch_size: int, seed: int, epochs: int, first_step: int, rank: int, ranks: int
) -> Iterator[StepPlan]:
    """All steps of a run from ``first_step`` on, as one process sees them.

    Every sample comes exactly once an epoch, whatever the number of processes and the first step.
    """
    per_epoch = steps_per_epoch(size, batch_size)
    for epoch in range(first_step // per_epoch, epochs):
        order = epoch_order(seed, epoch, size)
        start = first_step - epoch * per_epoch if epoch == first_step // per_epoch else 0
        for place in range(start, per_epoch):
            batch = order[place * batch_size : (place + 1) * batch_size]
            yield StepPlan(epoch * per_epoch + place, epoch, len(batch), share(batch, rank, ranks))


def plan_beside(
    plans: Iterable[StepPlan], *, size: int, batch_size: int, seed: int, rank: int, ranks: int
) -> Iterator[StepPlan]:
    """The images of a second domain that go with the steps of a first, as one process sees them.

    It is walked through in epochs of its own, in whole batches; what an epoch's last batch lacks is left to
    the next epoch. What goes with a step depends on the seed and the step's number alone.

    Args:
        plans: steps of the first domain.
        size: of the second.
        batch_size: images of the second in a step, over all processes; all of them where there are fewer.
        seed: of its order.
        rank, ranks: of the process.
    """
    taken = min(size, batch_size)
    order, known = np.empty(0, dtype=np.int64), -1
    for plan in plans:
        epoch, place = divmod(plan.step, size // taken)
        if epoch != known:
            order, known = epoch_order(seed_of("beside", seed), epoch, size), epoch
        batch = order[place * taken : (place + 1) * taken]
        yield StepPlan(plan.step, epoch, taken, share(batch, rank, ranks))


def blocks_of(size: int, batch_size: int, rank: int, ranks: int) -> Sequence[np.ndarray]:
    """Batches in natural order for one process: batch k goes to process k mod ranks.

    A batch has the same samples whatever the number of processes, so what is computed from whole batches
    (BatchNorm statistics) does not depend on it.
    """
    starts = range(0, size, batch_size)
    return [np.arange(start, min(start + batch_size, size)) for start in starts[rank::ranks]]
