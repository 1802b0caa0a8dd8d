"""The loop: every step of training, and nothing else.

Shapes: N images of this process's share of a step, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from tldist.data.loader import Batch
from tldist.data.order import seed_of
from tldist.distributed import Team
from tldist.models.blocks import training_mode
from tldist.training.signals import StopFlag

Objective = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, K) float32 and labels (N,) to the loss of each sample (N,)."""


@dataclass(frozen=True)
class Learner:
    """What learns, and how.

    Attributes:
        model: the bare module.
        wrapped: the same behind Accelerate (DDP, autocast).
        optimizer: behind Accelerate.
        bare_optimizer: the same without it, for its state.
        accelerator, team: the job.
        frozen: modules that stay in evaluation mode.
        objective: loss of each sample.
        to_input: the loader's images (or features) on the device to the input of ``wrapped``.
        learning_rate: samples seen to learning rate.
        seed: of dropout.
        pieces: into how many parts a process cuts its share of a step.
        clip: largest norm of the gradient.
    """

    model: nn.Module
    wrapped: nn.Module
    optimizer: Optimizer
    bare_optimizer: Optimizer
    accelerator: Accelerator
    team: Team
    frozen: list[nn.Module]
    objective: Objective
    to_input: Callable[[Tensor], Tensor]
    learning_rate: Callable[[float], float]
    seed: int
    pieces: int = 1
    clip: float | None = None


@dataclass(frozen=True)
class Step:
    """What came of one step.

    Attributes:
        number: steps done, this one included.
        epoch: from 0.
        samples: samples seen over all processes, this step's included.
        loss_sum: float64 (), of this process's valid samples; on the device.
        counts: float64 (2,), over all processes: valid samples of the step, processes asked to stop.
        lr: the learning rate used.
    """

    number: int
    epoch: int
    samples: int
    loss_sum: Tensor
    counts: Tensor
    lr: float


def train(learner: Learner, batches: Iterable[Batch], samples: int, stop: StopFlag) -> Iterator[Step]:
    """Take one optimiser step a batch, and hand over what came of it.

    Args:
        learner: what learns.
        batches: this process's share of each step.
        samples: seen before the first of them.
        stop: whether this process was asked to stop; all learn of it with the step's counts.
    """
    device = learner.team.device
    learner.model.eval()
    for batch in batches:
        plan = batch.step
        assert plan is not None, "training batches carry their step"
        if not learner.model.training:  # at the start, and after a measurement
            training_mode(learner.model, learner.frozen)
        # Dropout depends on (seed, step, rank) alone, so that nothing random has to be saved.
        torch.manual_seed(seed_of("dropout", learner.seed, plan.step, learner.team.rank))
        lr = learner.learning_rate(samples + plan.total / 2)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr

        counts = torch.tensor([batch.valid.sum(), stop.requested], dtype=torch.float64).to(device)
        learner.team.sum(counts)
        # DDP takes the mean of the processes' gradients: this factor makes it the mean over the samples
        # of all, whatever each has; a process without samples gives a zero gradient.
        scale = (learner.team.size / counts[0].clamp(min=1)).float()

        loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        for images, labels, valid, last in _pieces(batch, learner.pieces, device):
            with nullcontext() if last else learner.accelerator.no_sync(learner.wrapped):
                logits = learner.wrapped(learner.to_input(images))
                losses = learner.objective(logits.float(), labels) * valid
                learner.accelerator.backward(losses.sum() * scale)
            loss_sum += losses.detach().double().sum()
        if learner.clip is not None:
            learner.accelerator.clip_grad_norm_(learner.wrapped.parameters(), learner.clip)
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)

        samples += plan.total
        yield Step(plan.step + 1, plan.epoch, samples, loss_sum, counts, lr)


def _pieces(batch: Batch, pieces: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, bool]]:
    """Cut a batch for gradient accumulation: images, labels, valid, and whether it is the last piece."""
    images = batch.images.to(device, non_blocking=True)
    labels = batch.labels.to(device, non_blocking=True).clamp(min=0)
    valid = batch.valid.to(device, non_blocking=True)
    size = -(-len(images) // pieces)
    starts = range(0, len(images), size)
    for start in starts:
        part = slice(start, start + size)
        yield images[part], labels[part], valid[part], start == starts[-1]


def cross_entropy(label_smoothing: float) -> Objective:
    """Cross-entropy of each sample, with the target spread by ``label_smoothing`` (arXiv:1512.00567)."""
    return lambda logits, labels: nn.functional.cross_entropy(
        logits, labels, reduction="none", label_smoothing=label_smoothing
    )
