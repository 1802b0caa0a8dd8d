"""How far a student is from its teachers on images held out: what chooses the best without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tldist.data.loader import Batch, load_batches
from tldist.data.order import blocks_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError, Preempted
from tldist.fuse.distill.targets import Teach
from tldist.progress import progress_bar
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger
from tldist.training.signals import StopFlag


@dataclass(frozen=True)
class Agreement:
    """How a student follows its teachers on one domain. Independent of the number of processes.

    Attributes:
        loss: the mean distillation loss.
        agreement: the share of images of which student and teachers hold the same class most likely.
        count: images measured.
    """

    loss: float
    agreement: float
    count: int

    @property
    def score(self) -> float:
        """The best has the lowest loss."""
        return -self.loss

    def better_than(self, score: float, loss: float) -> bool:
        """Whether its loss is lower."""
        return self.loss < loss

    def numbers(self) -> dict[str, float]:
        """What a training logs of it."""
        return {"val_distill_loss": self.loss, "val_agreement": self.agreement}

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"distill_loss": self.loss, "agreement": self.agreement, "count": self.count}


Losses = Callable[[Batch], tuple[Tensor, Tensor]]
"""A taught batch to the loss of each image (N,), and whether student and teachers agree on it: bool (N,)."""


def judge(
    losses: Losses,
    domain: Domain,
    how: Preprocessing,
    teach: Teach,
    team: Team,
    *,
    batch_size: int = 64,
    workers: int = 0,
    label: str = "validate",
    stop: StopFlag | None = None,
) -> Agreement:
    """Measure a student; called by all processes together.

    Args:
        losses: the student's, in evaluation mode.
        domain: images held out.
        how: the student's preprocessing.
        teach: gives what the teachers say of them.
        team: the processes.
        batch_size: images that one process handles at once.
        workers: decoding processes.
        label: of the progress bar.
        stop: whether this process was asked to stop; None: it goes on to the end.

    Raises:
        Preempted: a process was asked to stop; on all of them alike.
        DomainError: too many broken images, or no whole one.
    """
    ledger = Ledger(domain, None)
    plans = blocks_of(len(domain), batch_size, team.rank, team.size)
    # Batches that each process has: in these all can ask each other.
    in_common = len(blocks_of(len(domain), batch_size, team.size - 1, team.size))
    sums = torch.zeros(3, dtype=torch.float64, device=team.device)
    with progress_bar(len(domain), "img", label, keep=False) as bar:
        for place, batch in enumerate(map(teach, load_batches(domain, plans, how, workers=workers))):
            if stop is not None and place < in_common and team.any(stop.requested):
                raise Preempted(f"told to stop while measuring ({label})")
            ledger.add(batch.broken)
            loss, agrees = losses(batch)
            valid = batch.valid.to(team.device)
            parts = (loss[valid].double().sum(), agrees[valid].double().sum(), valid.double().sum())
            sums += torch.stack(parts)
            bar.update(len(batch.indices) * team.size)
    ledger.settle(team)
    total, agreed, count = team.sum(sums).tolist()
    if count == 0:
        raise DomainError(f"{domain.name}: no image could be decoded.")
    return Agreement(total / count, agreed / count, int(count))
