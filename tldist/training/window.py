"""Mean loss and rate since the last log line; a loss that is not finite is found with its step and images."""

from __future__ import annotations

import math
import time

import torch

from tldist.distributed import Team
from tldist.errors import Diverged
from tldist.files import write_json
from tldist.training.loop import Step
from tldist.training.track import Journal


class Window:
    """The steps since the last log line, over all processes.

    Args:
        journal: where lines are logged.
        team: the processes; all call together.
        every: steps of a line.
    """

    def __init__(self, journal: Journal, team: Team, every: int) -> None:
        self.journal, self.team, self.every = journal, team, every
        self.steps: list[Step] = []
        self.begin = time.perf_counter()
        self.waited = 0.0  # seconds that this process waited for data

    def add(self, step: Step, flush: bool) -> float | None:
        """Note a step; where a line is due, log it and return its mean loss.

        Args:
            step: what came of it.
            flush: check the losses now (something is about to be saved).

        Raises:
            Diverged: a loss is not finite.
        """
        self.steps.append(step)
        if not flush and step.number % self.every:
            return None
        total = self.team.sum(torch.stack([done.loss_sum for done in self.steps]))
        counts = torch.stack([done.counts[0] for done in self.steps])
        if not bool(torch.isfinite(total).all()):
            self._explain(self.steps[int((~torch.isfinite(total)).nonzero()[0])])
        moved = self._transfer_losses()
        count = float(counts.sum())
        loss = float(total.sum()) / max(1.0, count)
        seconds = time.perf_counter() - self.begin
        self.journal.log(
            step=step.number,
            epoch=step.plan.epoch + 1,
            samples=step.samples,
            loss=loss,
            lr=step.lr,
            **({} if moved is None else {"transfer_loss": moved, "adapt_weight": step.strength}),
            images_per_second=round(count / seconds, 2),
            data_wait=round(self.waited / seconds, 4),
        )
        self.steps = []
        self.restart()
        return loss

    def restart(self) -> None:
        """Count time from now on: what lies between the last line and now was no training."""
        self.begin, self.waited = time.perf_counter(), 0.0

    def _transfer_losses(self) -> float | None:
        """Mean loss of the adaptation, where there is one."""
        losses = [(step, float(step.transfer)) for step in self.steps if step.transfer is not None]
        for step, loss in losses:
            if not math.isfinite(loss):
                self._explain(step)
        return sum(loss for _, loss in losses) / len(losses) if losses else None

    def _explain(self, step: Step) -> None:
        """Name the first bad step and its images; the same command reaches it again."""
        indices = [int(i) for part in self.team.gather(step.plan.indices.tolist()) for i in part]
        record = self.journal.folder.path / f"not_finite-step-{step.number:08d}.json"
        found = {"step": step.number, "epoch": step.plan.epoch + 1, "lr": step.lr, "positions": indices}
        if self.team.is_main:
            write_json(record, found)
        raise Diverged(
            f"the loss of step {step.number} is not finite (learning rate {step.lr:.3g}, images at positions "
            f"{', '.join(map(str, indices[:8]))}{', ...' if len(indices) > 8 else ''} of the domain; all in "
            f"{record}). Nothing after the last checkpoint was saved: the same command goes on from there "
            f"and comes to the same step. Lower optimizer.lr, or set optimizer.clip."
        )
