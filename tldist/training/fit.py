"""What happens around the steps of a training, once in a while: log, measure, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tldist.data.loader import Batch
from tldist.data.order import steps_per_epoch
from tldist.distributed import Team
from tldist.errors import Preempted
from tldist.progress import progress_bar, say
from tldist.runs import CHECKPOINTS, RunFolder
from tldist.training.checkpoint import Position, newest_checkpoint, restore, retain, save_checkpoint
from tldist.training.ledger import Ledger
from tldist.training.loop import Learner, Step, train
from tldist.training.measure import Measurement
from tldist.training.signals import StopFlag

LOG_LINES = 200
"""About how many lines of training loss a run writes."""


@dataclass
class Fit:
    """A training under way.

    Attributes:
        learner: what learns.
        folder: the run, for checkpoints and metrics.
        position: where it stands.
        ledger: broken images of the training domain.
        images: size of the training domain.
        batch_size: images of a step, over all processes.
        epochs: passes over the domain.
        validate: measures the model, given a label for its bar; None: the last weights are the best.
        every_steps: save after so many steps too.
        keep: newest checkpoints that stay.
    """

    learner: Learner
    folder: RunFolder
    position: Position
    ledger: Ledger
    images: int
    batch_size: int
    epochs: int
    validate: Callable[[str], Measurement] | None
    every_steps: int | None = None
    keep: int = 2

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.folder.path / CHECKPOINTS

    @property
    def epoch_steps(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(self.images, self.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.epoch_steps * self.epochs


def resume(learner: Learner, folder: RunFolder) -> Position:
    """Go on from the newest whole checkpoint, or start; called by all processes together."""
    team, checkpoints = learner.team, folder.path / CHECKPOINTS
    found = team.on_main(lambda: newest_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    position = Position() if found is None else restore(found, learner.model, learner.bare_optimizer)
    if learner.accelerator.scaler is not None and position.scaler:
        learner.accelerator.scaler.load_state_dict(position.scaler)
    team.on_main(lambda: folder.rewind_metrics(position.step))
    if found is not None:
        say(f"goes on after step {position.step:,} ({found.path})")
    return position


def fit(state: Fit, batches: Iterable[Batch], stop: StopFlag) -> None:
    """Take all steps that are left.

    Args:
        state: where the training stands; it is moved on.
        batches: this process's share of each step, from ``state.position.step`` on.
        stop: whether this process was asked to stop.

    Raises:
        Preempted: told to stop, and saved.
        DomainError: too many broken images.
    """
    team, position = state.learner.team, state.position
    window = _Window(team, max(1, state.total_steps // LOG_LINES))
    with progress_bar(state.images * state.epochs, "img", state.folder.stage, position.samples) as bar:
        for step in train(state.learner, _noting(batches, state.ledger), position.samples, stop):
            bar.update(step.samples - position.samples)
            position.step, position.samples = step.number, step.samples
            line = window.add(step)
            if line and team.is_main:
                state.folder.log(**line)
                bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
            epoch_ends = step.number % state.epoch_steps == 0
            if epoch_ends:
                state.ledger.settle(team)
                _validate(state, step)
            stopping = bool(step.counts[1] > 0)
            due = state.every_steps is not None and step.number % state.every_steps == 0
            if epoch_ends or stopping or due:
                _save(state)
            if stopping and step.number < state.total_steps:
                raise Preempted(
                    f"told to stop; saved after step {step.number:,} of {state.total_steps:,} in "
                    f"{state.folder.path}. The same command goes on there."
                )


def _noting(batches: Iterable[Batch], ledger: Ledger) -> Iterator[Batch]:
    for batch in batches:
        ledger.add(batch.broken)
        yield batch


def _validate(state: Fit, step: Step) -> None:
    """Measure and remember the best: the highest accuracy, then the lowest loss, then the earliest."""
    if state.validate is None:
        return
    found = state.validate(f"validate {step.epoch + 1}/{state.epochs}")
    best = state.position.best
    if best is None or (found.accuracy, -found.loss) > (best["accuracy"], -best["loss"]):
        state.position.best = {"step": step.number, "accuracy": found.accuracy, "loss": found.loss}
    if state.learner.team.is_main:
        state.folder.log(
            step=step.number, epoch=step.epoch + 1, val_accuracy=found.accuracy, val_loss=found.loss
        )


def _save(state: Fit) -> None:
    """Save on the main process while the others wait; keep the newest and the best."""
    position, learner = state.position, state.learner
    position.broken = {str(index): reason for index, reason in state.ledger.found.items()}
    if learner.accelerator.scaler is not None:
        position.scaler = learner.accelerator.scaler.state_dict()

    def save() -> None:
        save_checkpoint(state.checkpoints, learner.model, learner.bare_optimizer, position)
        retain(state.checkpoints, state.keep, position.best_step)

    learner.team.on_main(save)


class _Window:
    """Mean loss and rate of the steps since the last log line, over all processes."""

    def __init__(self, team: Team, every: int) -> None:
        self.team, self.every = team, every
        self._reset()

    def _reset(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []
        self.begin = time.perf_counter()

    def add(self, step: Step) -> dict[str, Any] | None:
        """A log line when one is due; called by all processes together."""
        self.losses.append(step.loss_sum)
        self.counts.append(step.counts[0])
        if step.number % self.every:
            return None
        loss = self.team.sum(torch.stack(self.losses).sum())
        count = float(torch.stack(self.counts).sum())
        rate = count / (time.perf_counter() - self.begin)
        self._reset()
        return {
            "step": step.number,
            "epoch": step.epoch + 1,
            "samples": step.samples,
            "loss": float(loss) / max(1.0, count),
            "lr": step.lr,
            "images_per_second": round(rate, 2),
        }
