"""How much of each model to take, tensor by tensor: learned from unlabelled images (AdaMerging)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tldist.bundle import Task
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import Diverged, DomainError
from tldist.fuse.statistics.collapse import Answers, count_answers
from tldist.fuse.statistics.guard import CollapseGuard
from tldist.fuse.statistics.mix import Mix
from tldist.fuse.statistics.steps import StepImages, plan_parts
from tldist.fuse.statistics.walk import sum_over
from tldist.models.load import input_tensor
from tldist.progress import progress_bar, warn
from tldist.runtime.preprocess import Preprocessing
from tldist.training.batchnorm import batchnorm_layers, by_batch
from tldist.training.ledger import Ledger


@dataclass(frozen=True)
class Learning:
    """How coefficients are learned; the defaults are the paper's but for the batch.

    Attributes:
        scale: where every coefficient starts.
        steps: of Adam.
        lr: its learning rate.
        batch_size: images of one step, over all processes.
        part_size: images that one process handles at once, and that BatchNorm normalises together: a step
            has the same parts for any number of processes.
        by_tensor: a coefficient for each model and tensor (layer-wise); else one for each model (task-wise).
        seed: of the order of images.
        workers: decoding processes.
        memory_bytes: a process keeps its images decoded, as uint8, where they fit.
    """

    scale: float = 0.3
    steps: int = 500
    lr: float = 1e-3
    batch_size: int = 64
    part_size: int = 32
    by_tensor: bool = True
    seed: int = 0
    workers: int = 0
    memory_bytes: int = 2 << 30


@dataclass(frozen=True)
class Learned:
    """What came out, as plain data.

    Attributes:
        coefficients: name of a parameter to one number a model.
        entropies: of each step, in nats an image, before its update.
        shares: of each step, the part of the last images that got the most frequent answer.
        steps: how many were taken.
        kept: after how many of them the coefficients were these: all, or fewer where answers collapsed.
        collapsed: whether all answers became one.
    """

    coefficients: dict[str, tuple[float, ...]]
    entropies: list[float]
    shares: list[float]
    steps: int
    kept: int
    collapsed: bool


def entropy(logits: Tensor, task: Task) -> Tensor:
    """Of the answers to images, in nats, (N, K) to (N,); of several classes an image, the mean of theirs."""
    if task == "multilabel":
        softplus = nn.functional.softplus
        parts = logits.sigmoid() * softplus(-logits) + (-logits).sigmoid() * softplus(logits)
        return parts.mean(1)
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def learn_coefficients(
    model: nn.Module,
    base: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    learning: Learning,
    task: Task = "multiclass",
    agreed: Collection[str] = (),
) -> Learned:
    """Coefficients of ``merged = base + sum_m lambda_m (theta_m - base)`` that make the entropy of the merged
    model's answers smallest, eq. 7 and 8 of arXiv:2310.02575; labels are not read.

    Called by all processes together; the same for any number of them. BatchNorm layers normalise by the
    part's images: each step has other weights, which no kept statistics fit; and re-estimation after the
    merge will bring just about these. Where all answers become one, learning stops, and the coefficients are
    those of the step of least entropy among the steps before that were still half as mixed as the start, or
    the start's.

    Args:
        model: of the architecture, on the team's device; put into evaluation mode, else unchanged.
        base, models: the parameters by the model's names, classes in one order. All of them are kept on the
            team's device.
        how: the preprocessing.
        domain: the images.
        team: the processes; of more than there are parts in a step, some have nothing to do.
        ledger: takes the broken images.
        learning: how.
        task: one class an image, or several.
        agreed: paths of BatchNorm layers that keep their statistics.

    Raises:
        DomainError: too many broken images, or none that can be used.
        Diverged: the entropy is not finite.
    """
    model.eval()
    layers = batchnorm_layers(model, agreed)
    mix = Mix(model, base, models, team.device, scale=learning.scale, by_tensor=learning.by_tensor)
    guard = CollapseGuard(mix.coefficients)
    optimizer = torch.optim.Adam([mix.coefficients], lr=learning.lr)
    entropies: list[float] = []
    plans = plan_parts(len(domain), learning.batch_size, learning.part_size, learning.seed, learning.steps)
    _say_idle(team, max(map(len, plans), default=0))
    images = StepImages(how, domain, team, ledger, plans, learning.workers, learning.memory_bytes)
    with (
        by_batch(layers) if layers else nullcontext(),
        progress_bar(learning.steps, "step", "AdaMerging", keep=False) as bar,
    ):
        for step in range(learning.steps):
            parts = [part for part in images.of(step) if len(part) > (1 if layers else 0)]
            found = _differentiate(model, mix, parts, how, task).over(team)
            bar.update(1)
            if not found.count:
                continue
            entropies.append(found.entropy / found.count)
            if not math.isfinite(entropies[-1]):
                raise Diverged(
                    f"AdaMerging: the entropy is not finite at step {step}. Check the models with tldist "
                    f"evaluate, or lower the learning rate or the scale."
                )
            if guard.sees_collapse(found.answers, entropies[-1], mix.coefficients):
                break
            mix.coefficients.grad = found.gradient / found.count
            optimizer.step()
            bar.set_postfix_str(f"entropy {entropies[-1]:.4f}", refresh=False)
    ledger.settle(team)
    if not entropies:
        raise DomainError(f"{domain.name}: no batch of images that can be decoded and learned from.")
    kept = guard.best if guard.collapsed else mix.coefficients.detach()
    return Learned(
        mix.named(kept),
        entropies,
        guard.shares,
        len(entropies),
        guard.best_step if guard.collapsed else len(entropies),
        guard.collapsed,
    )


def _say_idle(team: Team, parts: int) -> None:
    if team.size > parts:
        warn(f"AdaMerging: a step has {parts} parts, so {team.size - parts} processes have nothing to do")


@dataclass
class _Step:
    """What one step has found, on one process or on all; sums over images."""

    gradient: Tensor
    entropy: float = 0.0
    count: int = 0
    answers: Answers = field(default_factory=Counter)

    def over(self, team: Team) -> _Step:
        """The sums over all processes."""
        numbers = torch.tensor([self.entropy, self.count], dtype=torch.float64)
        flat = sum_over(team, torch.cat([numbers, self.gradient.reshape(-1)]))
        answers: Answers = sum(team.gather(self.answers), Counter())
        return _Step(flat[2:].view_as(self.gradient), float(flat[0]), round(float(flat[1])), answers)


def _differentiate(
    model: nn.Module, mix: Mix, parts: Sequence[Tensor], how: Preprocessing, task: Task
) -> _Step:
    """Entropy and gradient over this process's parts, one in memory at a time."""
    step = _Step(torch.zeros_like(mix.coefficients.detach()))
    if not parts:
        return step
    merged = mix.merged()
    for images in parts:
        logits = functional_call(model, merged, (input_tensor(images, how, dtype=_dtype(merged)),))
        total = entropy(logits, task).sum()
        step.gradient += mix.chain(torch.autograd.grad(total, list(merged.values()), allow_unused=True))
        step.entropy += float(total.detach().double())
        step.count += len(images)
        step.answers += count_answers(logits.detach(), task)
    return step


def _dtype(parameters: Mapping[str, Tensor]) -> torch.dtype:
    return next(iter(parameters.values())).dtype
