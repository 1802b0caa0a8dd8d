"""The loop: every step of training, and nothing else.

Shapes: N images of this process's share of a step, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from tldist.data.loader import Batch
from tldist.data.order import StepPlan, seed_of
from tldist.distributed import Team
from tldist.models.blocks import training_mode
from tldist.training.objective import Objective
from tldist.training.optim import PullToStart
from tldist.training.signals import StopFlag
from tldist.training.transfer import Others, Transfer, logits_of

Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images (N, ...) and labels (N,) to mixed images and label probabilities (N, K)."""


@dataclass(frozen=True)
class Learner:
    """What learns, and how.

    Attributes:
        model: the bare module.
        wrapped: the part of it that runs in each step, behind Accelerate (DDP, autocast).
        optimizer: steps the weights; behind Accelerate where the loss is scaled (fp16).
        bare_optimizer: the same without Accelerate, for its state.
        accelerator, team: the job.
        frozen: modules that stay in evaluation mode.
        objective: loss of each sample.
        to_input: the loader's images (or features) on the device to the input of ``wrapped``.
        learning_rate: samples seen to learning rate.
        seed: of dropout and mixing.
        pieces: into how many parts a process cuts its share of a step.
        clip: largest norm of the gradient.
        mix: mixup or cutmix, on the batch, on the device.
        pull: L2-SP.
        average: exponential moving average of the weights.
        transfer: adaptation to a target domain; ``wrapped`` is then a `tldist.adaptation.network.Adapting`.
        auxiliary: what learns beside the model, and is no part of the result.
        before_change: called before the weights change: a save may still be reading them.
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
    mix: Mix | None = None
    pull: PullToStart | None = None
    average: AveragedModel | None = None
    transfer: Transfer | None = None
    auxiliary: nn.Module | None = None
    before_change: Callable[[], None] = lambda: None

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """While inside, the model has the averaged weights, where they are kept."""
        if self.average is None:
            yield
            return
        own = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.model.load_state_dict(self.average.module.state_dict())
        try:
            yield
        finally:
            self.model.load_state_dict(own)


@dataclass(frozen=True)
class Step:
    """What came of one step.

    Attributes:
        plan: of this process.
        samples: samples seen over all processes, this step's included.
        loss_sum: float64 (), of this process's valid samples; on the device.
        counts: float64 (2,), over all processes: valid samples of the step, processes asked to stop.
        lr: the learning rate used.
        transfer: float64 (), the loss of the adaptation, weighted, the same on all processes; None: there is
            none.
        strength: its weight in this step.
    """

    plan: StepPlan
    samples: int
    loss_sum: Tensor
    counts: Tensor
    lr: float
    transfer: Tensor | None = None
    strength: float = 0.0

    @property
    def number(self) -> int:
        """Steps done, this one included."""
        return self.plan.step + 1


def train(learner: Learner, batches: Iterable[Batch], samples: int, stop: StopFlag) -> Iterator[Step]:
    """Take one optimiser step a batch, and hand over what came of it.

    Args:
        learner: what learns.
        batches: this process's share of each step.
        samples: seen before the first of them.
        stop: whether this process was asked to stop; all learn of it with the step's counts.
    """
    device = learner.team.device
    norms = _live_norms(learner)
    learner.model.eval()
    for batch in batches:
        plan = batch.step
        assert plan is not None, "training batches carry their step"
        if not learner.model.training:  # at the start, and after a measurement
            training_mode(learner.model, learner.frozen)
        # Dropout and mixing depend on (seed, step, rank) alone, so that nothing random has to be saved.
        _seed(seed_of("dropout", learner.seed, plan.step, learner.team.rank), device)
        lr = learner.learning_rate(samples + plan.total / 2)
        for group in learner.optimizer.param_groups:
            group["lr"] = lr * group["scale"]

        counts = torch.tensor([batch.valid.sum(), stop.requested], dtype=torch.float64).to(device)
        learner.team.sum(counts)
        # DDP takes the mean of the processes' gradients: this factor makes it the mean over the samples
        # of all, whatever each has; a process without samples gives a zero gradient.
        scale = (learner.team.size / counts[0].clamp(min=1)).float()

        if norms and learner.team.shards:
            learner.team.same_buffers(learner.model)  # as DDP does

        # The same on all processes: a sharded model meets the others in each forward pass.
        pieces = min(learner.pieces, -(-plan.total // learner.team.size))
        loss_sum, moved = torch.zeros((), dtype=torch.float64, device=device), None
        transfer, done = learner.transfer, samples + plan.total / 2
        others = transfer.others(batch, done, learner.to_input) if transfer else None
        for images, labels, weight, last in _pieces(batch, pieces, device):
            inputs: Tensor = learner.to_input(images)
            targets = labels
            if learner.mix is not None:
                inputs, targets = learner.mix(inputs, labels)
            sync = nullcontext() if last else learner.accelerator.no_sync(learner.wrapped)
            with sync, _normalised(norms, by_batch=_smallest(images, others) > 1):
                with learner.accelerator.autocast():  # Accelerate does not wrap a sharded model's forward
                    outputs = learner.wrapped(inputs, *(others.arguments if others else ()))
                losses = learner.objective(logits_of(outputs).float(), targets) * weight
                loss = losses.sum() * scale
                if transfer is not None and others is not None:
                    moved = transfer.loss(outputs, labels, int(weight) * len(labels), others)
                    loss = loss + moved * learner.team.size  # all have it whole: DDP's mean is to leave it
                learner.accelerator.backward(loss)
            loss_sum += losses.detach().double().sum()
        if learner.pull is not None:
            learner.pull()
        if learner.clip is not None:
            learner.accelerator.clip_grad_norm_(learner.wrapped.parameters(), learner.clip)
        learner.before_change()
        learner.optimizer.step()
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.average is not None:
            learner.average.update_parameters(learner.model)

        samples += plan.total
        moved = None if moved is None else moved.detach().double()
        yield Step(plan, samples, loss_sum, counts, lr, moved, others.strength if others else 0.0)


def _smallest(images: Tensor, others: Others | None) -> int:
    """Images of the smaller domain in this process's share."""
    return len(images) if others is None or others.images is None else min(len(images), len(others.images))


def _live_norms(learner: Learner) -> list[_BatchNorm]:
    """The BatchNorm layers that learn."""
    frozen = set(learner.frozen)
    return [m for m in learner.model.modules() if isinstance(m, _BatchNorm) and m not in frozen]


@contextmanager
def _normalised(norms: list[_BatchNorm], by_batch: bool) -> Iterator[None]:
    """While inside, BatchNorm normalises by the batch, or by what it remembers: one image has no variance."""
    if by_batch:
        yield
        return
    for module in norms:
        module.training = False
    try:
        yield
    finally:
        for module in norms:
            module.training = True


def _seed(seed: int, device: torch.device) -> None:
    """Seed the generators that this process draws from. `torch.manual_seed` would queue a call for each
    kind of device that is not initialised, with a stack trace, in every step."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _pieces(batch: Batch, pieces: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor, float, bool]]:
    """Cut a batch for gradient accumulation: images, labels, weight, and whether it is the last piece.

    Broken images are left out; a piece without images is one image of weight 0, which keeps the process in
    step with the others.
    """
    images, labels = batch.images, batch.labels
    if not labels.is_floating_point():
        labels = labels.clamp(min=0)
    if not batch.valid.all() and batch.valid.any():
        images, labels = images[batch.valid], labels[batch.valid]
    left = int(batch.valid.sum())
    images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    size = max(1, -(-left // pieces))
    for place in range(pieces):
        start = place * size
        part, weight = (slice(start, start + size), 1.0) if start < left else (slice(0, 1), 0.0)
        yield images[part], labels[part], weight, place == pieces - 1
