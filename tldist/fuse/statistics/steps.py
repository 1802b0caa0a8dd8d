"""The images of learning steps: the same parts for any number of processes, decoded once if they fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import torch
from torch import Tensor

from tldist.data.loader import load_batches
from tldist.data.order import epoch_order
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.progress import progress_bar, say
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger

_DECODE_AT_ONCE = 64


def plan_parts(size: int, batch_size: int, part_size: int, seed: int, steps: int) -> list[list[np.ndarray]]:
    """The positions of each step's images, in parts.

    Each epoch has another order; its steps, and the parts of a step, differ in size by one image at most.

    Args:
        size: images of the domain.
        batch_size: the most images of a step.
        part_size: the most images of a part.
        seed: of the order.
        steps: how many.
    """
    plans: list[list[np.ndarray]] = []
    for epoch in count():
        for batch in np.array_split(epoch_order(seed, epoch, size), -(-size // batch_size)):
            if len(plans) == steps:
                return plans
            plans.append(np.array_split(batch, -(-len(batch) // part_size)))
    raise AssertionError("epochs do not end")


class StepImages:
    """This process's images, step by step: of the parts of a step, every ``team.size``-th one.

    Args:
        how: the preprocessing.
        domain: the images.
        team: the processes.
        ledger: takes the broken images; to be settled by all processes at the end.
        plans: of `plan_parts`.
        workers: decoding processes.
        memory_bytes: keep decoded images where all of this process fit; else they are decoded when needed.
    """

    def __init__(
        self,
        how: Preprocessing,
        domain: Domain,
        team: Team,
        ledger: Ledger,
        plans: Sequence[Sequence[np.ndarray]],
        workers: int,
        memory_bytes: int,
    ) -> None:
        self.how, self.domain, self.team, self.ledger, self.workers = how, domain, team, ledger, workers
        self.mine = [list(parts[team.rank :: team.size]) for parts in plans]
        flat = [part for parts in self.mine for part in parts]
        used = np.unique(np.concatenate(flat)) if flat else np.zeros(0, np.int64)
        needed = len(used) * how.height * how.width * 3
        if needed > memory_bytes:
            say(
                f"{needed / 2**30:.1f} GiB of decoded images are more than the "
                f"{memory_bytes / 2**30:.1f} GiB allowed for each process: they are decoded again "
                f"in every epoch"
            )
        self.stream = self._decode(flat) if needed > memory_bytes else self._keep(flat, used)

    def of(self, step: int) -> list[Tensor]:
        """The parts of a step, to be asked for in order: uint8 (N, H, W, 3) on the team's device, without
        broken images."""
        return [next(self.stream).to(self.team.device) for _ in self.mine[step]]

    def _decode(self, parts: Sequence[np.ndarray]) -> Iterator[Tensor]:
        for batch in load_batches(self.domain, parts, self.how, workers=self.workers):
            self.ledger.add(batch.broken)
            yield batch.images[batch.valid]

    def _keep(self, parts: Sequence[np.ndarray], used: np.ndarray) -> Iterator[Tensor]:
        store = torch.empty(len(used), self.how.height, self.how.width, 3, dtype=torch.uint8)
        valid = torch.zeros(len(used), dtype=torch.bool)
        pieces = np.array_split(np.arange(len(used)), max(1, -(-len(used) // _DECODE_AT_ONCE)))
        plans = [used[piece] for piece in pieces if len(piece)]
        with progress_bar(len(used), "img", "decode", keep=False) as bar:
            done = 0
            for batch in load_batches(self.domain, plans, self.how, workers=self.workers):
                self.ledger.add(batch.broken)
                place = slice(done, done + len(batch.indices))
                store[place], valid[place] = batch.images, batch.valid
                done += len(batch.indices)
                bar.update(len(batch.indices))
        for part in parts:
            rows = torch.from_numpy(np.searchsorted(used, part))
            yield store[rows[valid[rows]]]
