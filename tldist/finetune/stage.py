"""One phase of a fine-tuning: its learner, its frozen part, its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tldist.data.augment import Augmentation
from tldist.data.loader import Batch, load_batches
from tldist.data.order import StepPlan, plan_beside
from tldist.domain import Domain
from tldist.finetune.adapt import beside
from tldist.finetune.frozen import CachedFeatures, FrozenPart, load_frozen, plan_frozen
from tldist.finetune.job import Job
from tldist.finetune.phases import Phase
from tldist.finetune.pseudo import with_pseudo_labels
from tldist.finetune.sweep import best_probe, each_probe, probe_rates, sweep_settings
from tldist.models.blocks import Block, freeze, frozen_tensors
from tldist.models.load import input_tensor
from tldist.training.fit import restore_learner
from tldist.training.loop import Learner
from tldist.training.measure import Measurement
from tldist.training.objective import (
    Objective,
    balanced_weights,
    binary_cross_entropy,
    build_mix,
    cross_entropy,
)
from tldist.training.optim import build_optimizer, layer_scales, learning_rate


@dataclass(frozen=True)
class Work:
    """What the steps of one phase need.

    Attributes:
        learner: what learns.
        train, validation, target: features in the place of images, where the frozen part is computed once.
    """

    learner: Learner
    train: CachedFeatures | None
    validation: CachedFeatures | None
    part: FrozenPart | None
    target: CachedFeatures | None = None

    def batches(self, job: Job, plan: Callable[[], Iterable[StepPlan]]) -> Iterator[Batch]:
        """Batches of the train domain, and of the target beside it where there is one: decoded and augmented
        images, or cached features.

        Args:
            job: the fine-tuning.
            plan: gives the steps of the train domain; each call the same.
        """
        target = job.adaptation.target if job.adaptation else None
        if target is None:
            return _load_batches(job, job.inputs.train, self.train, plan(), job.workers)
        if job.recipe.adapt.is_source_free:
            batches = _load_batches(job, job.inputs.train, self.train, plan(), job.workers)
            return with_pseudo_labels(job, batches) if job.recipe.adapt.pseudo_labels else batches
        plans = plan_beside(
            plan(), size=len(target), batch_size=job.recipe.batch_size, seed=job.recipe.seed,
            rank=job.team.rank, ranks=job.team.size,
        )  # fmt: skip
        workers = -(-job.workers // 2)  # for each of the two
        return beside(
            _load_batches(job, job.inputs.train, self.train, plan(), workers),
            _load_batches(job, target, self.target, plans, workers),
        )

    def validate(self, job: Job, label: str) -> Measurement:
        """Measure what would be kept now: of a sweep, the best probe."""
        with self.learner.averaged():
            if not job.recipe.sweep.is_on:
                return self.measure(job, label)
            found = self.measure_probes(job, label)
            return found[best_probe(found)]

    def measure(
        self, job: Job, label: str, *, keep_logits: bool = False, probe: int | None = None
    ) -> Measurement:
        """Measure the model on validation, from cached features where there are some."""
        if self.part and self.validation:
            return job.measure_cached(self.part, self.validation, label, keep_logits=keep_logits, probe=probe)
        return job.measure(job.numerics.precision, label, keep_logits=keep_logits, probe=probe)

    def measure_probes(self, job: Job, label: str) -> list[Measurement]:
        """Measure each probe of a sweep."""
        return [self.measure(job, label, probe=place) for place in range(len(sweep_settings(job.recipe)))]


def _load_batches(
    job: Job, domain: Domain, cached: CachedFeatures | None, plans: Iterable[StepPlan], workers: int
) -> Iterator[Batch]:
    if cached:
        return cached.batches(plans)
    return load_batches(
        domain,
        plans,
        job.inputs.how,
        classes=job.inputs.classes,
        augmentation=Augmentation.of(job.recipe.augment),
        views=job.recipe.augment.views,
        seed=job.recipe.seed,
        workers=workers,
    )


def plan_part(job: Job, phase: Phase) -> tuple[FrozenPart | None, str]:
    """Whether a phase's frozen part is computed once, and why or why not; the same on all processes."""
    learning = job.learning[phase]
    if not frozen_tensors(job.model, freeze(job.model, learning)):
        return None, ""
    learned = len(job.inputs.train) + (len(job.adaptation.target) if job.adaptation else 0)
    images = (learned, len(job.inputs.validation) if job.inputs.validation else 0)
    epochs = phase.last_epoch - phase.first_epoch
    part, words = plan_frozen(job.recipe, epochs, job.model, job.blocks, learning, job.inputs.how, images)
    refusals = [other for able, other in job.team.gather((part is not None, words)) if not able]
    return (None, refusals[0]) if refusals else (part, words)


def enter(job: Job, phase: Phase, part: FrozenPart | None) -> Work:
    """Freeze, build the learner, compute the frozen part or find it computed."""
    learning = job.learning[phase]
    frozen = freeze(job.model, learning)
    torch.set_num_threads(job.threads)
    learner = _build_learner(job, phase, learning, frozen, part)
    if job.resumed is not None and job.resumed.step > phase.first_epoch * job.state.epoch_steps:
        restore_learner(job.resumed, learner)
    job.resumed = None
    train = _load(job, part, job.inputs.train, True) if part else None
    held = job.inputs.validation
    validation = _load(job, part, held, False) if part and held else None
    other = job.adaptation.target if job.adaptation and not job.recipe.adapt.is_source_free else None
    target = _load(job, part, other, True) if part and other else None
    if part:
        torch.set_num_threads(job.cores)  # nothing is decoded from here on
    return Work(learner, train, validation, part, target)


def _load(job: Job, part: FrozenPart, domain: Domain, training: bool) -> CachedFeatures:
    return load_frozen(
        part,
        job.recipe,
        domain,
        job.inputs.classes,
        job.inputs.how,
        job.numerics,
        job.team,
        training=training,
        workers=job.workers,
        stop=job.stop,
    )


def _build_learner(
    job: Job, phase: Phase, learning: list[Block], frozen: list[nn.Module], part: FrozenPart | None
) -> Learner:
    recipe, rule, model, how = job.recipe, job.recipe.optimizer, job.model, job.inputs.how
    adaptation, objective = job.adaptation, _objective(job)
    pulled = job.pull is not None and phase.train != "head"
    count = len(sweep_settings(recipe))
    scales = layer_scales(model, job.blocks, rule.layer_decay) if rule.layer_decay else {}
    decays: dict[str, float] = {}
    if count:
        scales, decays = probe_rates(recipe, job.blocks[-1], model)
    accelerator = job.team.accelerator(job.numerics.precision)
    if job.team.shards:
        job.team.shard_units(accelerator, _units(job, learning))
    optimizer = build_optimizer(
        model,
        name=rule.name,
        lr=phase.lr,
        weight_decay=rule.weight_decay,
        momentum=rule.momentum,
        scales=scales,
        undecayed=_backbone_names(job) if pulled else frozenset(),
        decays=decays,
        fused=not job.team.shards,
        auxiliary=adaptation.auxiliary if adaptation else None,
    )
    runs = part.suffix if part else model
    if recipe.gradient_checkpointing:
        _recompute(model, learning)
    if adaptation:
        runs = adaptation.wrap(runs, model)
    wrapped, wrapped_optimizer = accelerator.prepare(
        torch.compile(runs) if recipe.compile else runs, optimizer
    )
    to_input: Callable[[Tensor], Tensor] = (
        (lambda features: features)
        if part
        else (lambda images: input_tensor(images, how, job.numerics.memory_format))
    )
    first, total = (len(job.inputs.train) * n for n in (phase.schedule_first, phase.schedule_last))
    return Learner(
        model=model,
        wrapped=wrapped,
        # Accelerate's wrapper only scales the loss of fp16; it also searches for a library in every step.
        optimizer=wrapped_optimizer if accelerator.scaler is not None else optimizer,
        bare_optimizer=optimizer,
        accelerator=accelerator,
        team=job.team,
        frozen=frozen,
        objective=each_probe(objective, count) if count else objective,
        to_input=to_input,
        learning_rate=lambda samples: learning_rate(
            samples - first, total - first, phase.lr, rule.warmup, rule.schedule
        ),
        seed=recipe.seed,
        pieces=recipe.gradient_accumulation,
        clip=rule.clip,
        mix=build_mix(recipe.augment.mixup, recipe.augment.cutmix, len(job.inputs.classes))
        if recipe.augment.mixes
        else None,
        pull=job.pull if pulled else None,
        average=job.average,
        transfer=adaptation.transfer(job.team, len(job.inputs.train) * job.state.epochs)
        if adaptation
        else None,
        auxiliary=adaptation.auxiliary if adaptation else None,
        before_change=job.state.saver.settle,
    )


def _objective(job: Job) -> Objective:
    recipe = job.recipe
    if recipe.adapt.is_source_free:
        plain = cross_entropy()
        return lambda logits, labels: recipe.adapt.pseudo_labels * plain(logits, labels)
    if job.inputs.train.is_multilabel:
        return binary_cross_entropy(recipe.label_smoothing)
    return cross_entropy(recipe.label_smoothing, _class_weights(job))


def _backbone_names(job: Job) -> frozenset[str]:
    return frozenset(name for name, _ in job.model.named_parameters() if not job.blocks[-1].owns(name))


def _class_weights(job: Job) -> Tensor | None:
    if job.recipe.class_weights == "none":
        return None
    labels = job.inputs.train.labels_in(job.inputs.classes)
    return balanced_weights(labels, len(job.inputs.classes)).to(job.team.device)


def _units(job: Job, learning: list[Block]) -> list[nn.Module]:
    """The composite modules of the blocks that learn: each is gathered as one (a lone layer's weights may be
    read from outside of it)."""
    modules = [job.model.get_submodule(path) for block in learning for path in block.modules]
    return [m for m in modules if any(True for _ in m.children()) and any(True for _ in m.parameters())]


def _recompute(model: nn.Module, learning: list[Block]) -> None:
    """Let the composite modules of the blocks that learn keep no activations (torch.utils.checkpoint)."""
    for path in [path for block in learning for path in block.modules]:
        module = model.get_submodule(path)
        if any(True for _ in module.children()) and not hasattr(module, "_tldist_recomputes"):
            forward = module.forward
            module._tldist_recomputes = True  # type: ignore[assignment]
            module.forward = lambda *args, run=forward: checkpoint(run, *args, use_reentrant=False)
