"""What happens around the steps of a training, once in a while: log, measure, save, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import nn
from torch.optim.swa_utils import AveragedModel

from tldist.data.loader import Batch
from tldist.data.order import steps_per_epoch
from tldist.distributed import Team
from tldist.errors import BundleError, Preempted
from tldist.progress import progress_bar, say
from tldist.runs import CHECKPOINTS, RunFolder
from tldist.training.checkpoint import (
    OPTIMIZER,
    Checkpoint,
    Position,
    list_checkpoints,
    newest_checkpoint,
    restore_weights,
)
from tldist.training.ledger import Ledger
from tldist.training.loop import Learner, train
from tldist.training.optim import load_optimizer_tensors
from tldist.training.saver import Saver
from tldist.training.signals import StopFlag
from tldist.training.track import Journal
from tldist.training.window import Window

LOG_LINES = 200
"""About how many lines of training loss a run writes."""


class Measured(Protocol):
    """What a measurement has to say of the weights of now."""

    @property
    def score(self) -> float:
        """What the best has most of."""
        ...

    @property
    def loss(self) -> float:
        """What it has least of, where scores are equal."""
        ...

    def better_than(self, score: float, loss: float) -> bool:
        """Whether it is better than an earlier one."""
        ...

    def numbers(self) -> dict[str, float]:
        """What is logged of it."""
        ...


@dataclass
class Fit:
    """A training under way.

    Attributes:
        folder: the run, for checkpoints and metrics.
        journal: takes the numbers.
        position: where it stands.
        ledger: broken images of the training domain.
        images: size of the training domain.
        batch_size: images of a step, over all processes.
        epochs: passes over the domain.
        validates: whether it is measured at the end of each epoch; else the last weights are the best.
        validate: measures the model, given a label for its bar; set by each phase.
        every_steps: save after so many steps too.
        saver: writes checkpoints.
        patience: epochs without a better measurement after which it ends; None: it takes all.
    """

    folder: RunFolder
    journal: Journal
    position: Position
    ledger: Ledger
    images: int
    batch_size: int
    epochs: int
    validates: bool
    saver: Saver
    validate: Callable[[str], Measured] | None = None
    every_steps: int | None = None
    patience: int | None = None

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

    def kept(self, best: bool) -> Checkpoint:
        """The checkpoint whose weights are the result.

        Args:
            best: that of the best measurement, where there was one; else the last.

        Raises:
            BundleError: it is gone.
        """
        best_step = self.position.best_step if best else None
        step = self.position.step if best_step is None else best_step
        found = next((c for c in list_checkpoints(self.checkpoints) if c.step == step), None)
        if found is None:
            raise BundleError(
                f"{self.checkpoints}: the checkpoint of step {step:,}, whose weights are to be kept, "
                f"is gone. Start again with another out=, or with select=last."
            )
        return found

    @property
    def is_measured(self) -> bool:
        """Whether the end of the last epoch was measured; a job that was told to stop meanwhile has not."""
        step = self.position.step
        return not self.validates or step % self.epoch_steps > 0 or self.position.measured == step

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken, or patience has run out."""
        if self.position.step >= self.total_steps:
            return True
        if self.patience is None or self.position.best_step is None:
            return False
        return self.position.step - self.position.best_step >= self.patience * self.epoch_steps


def resume(
    folder: RunFolder,
    team: Team,
    model: nn.Module,
    average: AveragedModel | None,
    auxiliary: nn.Module | None = None,
) -> tuple[Position, Checkpoint | None]:
    """Load weights, their average and what learns beside from the newest whole checkpoint; called by all
    processes together.

    Returns:
        Where the run stands, and the checkpoint (for the optimiser's state), if there is one.
    """
    checkpoints = folder.path / CHECKPOINTS
    found = team.on_main(lambda: newest_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    team.on_main(lambda: folder.rewind_metrics(found.step if found else 0))
    if found is None:
        return Position(), None
    say(f"goes on after step {found.step:,} ({found.path})")
    restore_weights(found, model, average, auxiliary)
    return found.position(), found


def restore_learner(checkpoint: Checkpoint, learner: Learner) -> None:
    """Load the optimiser's state, and that of fp16's loss scaling."""
    tensors = checkpoint.tensors(OPTIMIZER)
    load_optimizer_tensors(learner.bare_optimizer, learner.model, tensors, learner.auxiliary)
    scaler = checkpoint.position().scaler
    if learner.accelerator.scaler is not None and scaler:
        learner.accelerator.scaler.load_state_dict(scaler)


def fit(state: Fit, learner: Learner, batches: Iterable[Batch], stop: StopFlag) -> None:
    """Take the steps of ``batches``.

    Args:
        state: where the training stands; it is moved on.
        learner: what learns.
        batches: this process's share of each step, from ``state.position.step`` on.
        stop: whether this process was asked to stop.

    Raises:
        Preempted: told to stop, and saved.
        DomainError: too many broken images.
        Diverged: the loss is not a finite number.
    """
    try:
        if not state.is_measured:
            if not _validate(state):
                raise Preempted(
                    f"told to stop while measuring {state.folder.path}; the same command goes on."
                )
            _save(state, learner)
        if not state.is_over:
            _take_steps(state, learner, batches, stop)
    except Preempted:  # on all processes alike
        state.saver.wait()
        raise
    state.saver.wait()


def _take_steps(state: Fit, learner: Learner, batches: Iterable[Batch], stop: StopFlag) -> None:
    team, position = learner.team, state.position
    window = Window(state.journal, team, max(1, state.total_steps // LOG_LINES))
    with progress_bar(state.images * state.epochs, "img", state.folder.stage, position.samples) as bar:
        for step in train(learner, _noting(batches, state.ledger, window), position.samples, stop):
            bar.update(step.samples - position.samples)
            position.step, position.samples = step.number, step.samples
            epoch_ends = step.number % state.epoch_steps == 0
            stopping = bool(step.counts[1] > 0)
            due = state.every_steps is not None and step.number % state.every_steps == 0
            loss = window.add(step, flush=epoch_ends or stopping or due)
            if loss is not None:
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            if epoch_ends:
                state.ledger.settle(team)
                stopping = not _validate(state) or stopping
            if epoch_ends or stopping or due:
                _save(state, learner)
                window.restart()
            if state.is_over and state.is_measured:
                return
            if stopping:
                raise Preempted(
                    f"told to stop; saved after step {step.number:,} of {state.total_steps:,} in "
                    f"{state.folder.path}. The same command goes on there."
                )


def _noting(batches: Iterable[Batch], ledger: Ledger, window: Window) -> Iterator[Batch]:
    """Note broken images, and how long the loop waited for each batch."""
    source = iter(batches)
    while True:
        begin = time.perf_counter()
        batch = next(source, None)
        if batch is None:
            return
        window.waited += time.perf_counter() - begin
        ledger.add(batch.broken)
        yield batch


def _validate(state: Fit) -> bool:
    """Measure and remember the best: the highest score, then the lowest loss, then the earliest.

    Returns:
        Whether it came to its end: False where the job was told to stop meanwhile, on all processes alike.
    """
    if not state.validates:
        return True
    assert state.validate is not None
    position = state.position
    epoch = position.step // state.epoch_steps
    try:
        found = state.validate(f"validate {epoch}/{state.epochs}")
    except Preempted:
        return False
    position.measured = position.step
    best = position.best
    if best is None or found.better_than(best["score"], best["loss"]):
        position.best = {"step": position.step, "score": found.score, "loss": found.loss}
    state.journal.log(step=position.step, epoch=epoch, **found.numbers())
    return True


def _save(state: Fit, learner: Learner) -> None:
    position = state.position
    position.broken = {str(index): reason for index, reason in state.ledger.found.items()}
    if learner.accelerator.scaler is not None:
        position.scaler = learner.accelerator.scaler.state_dict()
    saver = state.saver
    saver.save(learner.model, learner.bare_optimizer, learner.average, position, learner.auxiliary)
