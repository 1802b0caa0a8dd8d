"""Everything that a fine-tuning works with: domains, start, numerics, learner, position; and its plan."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tldist.data.loader import num_workers
from tldist.data.order import seed_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.files import sha256_text
from tldist.finetune.domains import split_domains
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.blocks import cut_blocks, freeze, trainable_blocks
from tldist.models.description import architecture_name
from tldist.models.load import Start, hash_tensors, start_model
from tldist.progress import show_plan
from tldist.runs import RunFolder
from tldist.training.fit import Fit, resume
from tldist.training.ledger import LEDGER, Ledger
from tldist.training.loop import Learner, cross_entropy
from tldist.training.measure import Measurement, measure, predictor
from tldist.training.optim import build_optimizer, learning_rate
from tldist.training.precision import Numerics, settle_numerics


@dataclass(frozen=True)
class Inputs:
    """What a fine-tuning starts from.

    Attributes:
        train, validation: the domains; no validation where nothing is held out.
        classes: of the task.
        start: the model with its head.
    """

    train: Domain
    validation: Domain | None
    classes: tuple[str, ...]
    start: Start

    def fingerprints(self) -> dict[str, str]:
        """What identifies them, besides the recipe."""
        held = self.validation.fingerprint if self.validation else ""
        return {
            "data": sha256_text(self.train.fingerprint + held),
            "model": hash_tensors(self.start.model.state_dict()),
        }


@dataclass(frozen=True)
class Job:
    """A fine-tuning, prepared.

    Attributes:
        recipe, team, folder, inputs: what it was prepared from.
        numerics: how it computes.
        state: the training itself.
        workers: decoding processes of each process.
        frozen_names: parameters and buffers that may not change.
        frozen_before: their hash.
    """

    recipe: FinetuneRecipe
    team: Team
    folder: RunFolder
    inputs: Inputs
    numerics: Numerics
    state: Fit
    workers: int
    frozen_names: list[str]
    frozen_before: str

    @property
    def model(self) -> nn.Module:
        """The bare module."""
        return self.state.learner.model

    def measure(self, precision: str, label: str) -> Measurement:
        """Measure the model as it is now on the validation domain; called by all processes together."""
        assert self.inputs.validation is not None
        return _measure(
            self.inputs, self.team, self.model, precision, self.numerics.channels_last, self.workers, label
        )


def load_inputs(recipe: FinetuneRecipe) -> Inputs:
    """Open the domains and build the model; the new head depends on the seed alone."""
    train, validation, classes = split_domains(recipe.data, recipe.validation, recipe.seed)
    torch.manual_seed(seed_of("init", recipe.seed))
    start = start_model(
        recipe.model,
        recipe.weights,
        classes,
        image_size=recipe.image_size,
        new_head=recipe.head == "new",
        trust_code=recipe.trust_code,
    )
    return Inputs(train, validation, classes, start)


def prepare(recipe: FinetuneRecipe, team: Team, folder: RunFolder, inputs: Inputs) -> Job:
    """Freeze, choose the numerics, wrap by Accelerate, go on from the newest checkpoint."""
    model, how = inputs.start.model, inputs.start.config.preprocessing
    learning = trainable_blocks(cut_blocks(model), recipe.train)
    frozen = freeze(model, learning)
    frozen_names = [name for name in model.state_dict() if not any(block.owns(name) for block in learning)]
    share = -(-recipe.batch_size // (team.size * recipe.gradient_accumulation))
    numerics = settle_numerics(
        recipe.precision,
        folder.path / "precision.json",
        model,
        frozen,
        (how.height, how.width),
        team,
        share,
    )
    learner = _build_learner(recipe, team, inputs, numerics, frozen)
    frozen_before = hash_tensors(model.state_dict(), frozen_names)
    workers = num_workers(recipe.workers, team.local_size)
    position = resume(learner, folder)
    ledger = Ledger(inputs.train, folder.path / LEDGER)
    ledger.found = {int(index): reason for index, reason in position.broken.items()}

    def validate(label: str) -> Measurement:
        return _measure(inputs, team, model, numerics.precision, numerics.channels_last, workers, label)

    state = Fit(
        learner=learner,
        folder=folder,
        position=position,
        ledger=ledger,
        images=len(inputs.train),
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        validate=validate if inputs.validation else None,
        every_steps=recipe.checkpoint.every_steps,
        keep=recipe.checkpoint.keep,
    )
    return Job(recipe, team, folder, inputs, numerics, state, workers, frozen_names, frozen_before)


def _build_learner(
    recipe: FinetuneRecipe, team: Team, inputs: Inputs, numerics: Numerics, frozen: list[nn.Module]
) -> Learner:
    model, how = inputs.start.model, inputs.start.config.preprocessing
    memory = torch.channels_last if numerics.channels_last else torch.contiguous_format
    model.to(memory_format=memory)
    rule, total = recipe.optimizer, len(inputs.train) * recipe.epochs
    optimizer = build_optimizer(
        model, name=rule.name, lr=rule.lr, weight_decay=rule.weight_decay, momentum=rule.momentum
    )
    accelerator = team.accelerator(numerics.precision)
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    return Learner(
        model=model,
        wrapped=wrapped,
        optimizer=wrapped_optimizer,
        bare_optimizer=optimizer,
        accelerator=accelerator,
        team=team,
        frozen=frozen,
        objective=cross_entropy(recipe.label_smoothing),
        how=how,
        memory_format=memory,
        learning_rate=lambda samples: learning_rate(samples, total, rule.lr, rule.warmup, rule.schedule),
        seed=recipe.seed,
        pieces=recipe.gradient_accumulation,
        clip=rule.clip,
    )


def _measure(
    inputs: Inputs,
    team: Team,
    model: nn.Module,
    precision: str,
    channels_last: bool,
    workers: int,
    label: str,
) -> Measurement:
    assert inputs.validation is not None
    how = inputs.start.config.preprocessing
    team.same_buffers(model)
    predict = predictor(model, how, precision=precision, channels_last=channels_last)
    return measure(predict, inputs.validation, inputs.classes, how, team, workers=workers, label=label)


def show_job(job: Job) -> None:
    """Print the plan."""
    recipe, team, inputs, start = job.recipe, job.team, job.inputs, job.inputs.start
    learning = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in job.model.parameters())
    held = (
        f"{len(inputs.validation):,} to choose the best"
        if inputs.validation
        else "none held out: the last is kept"
    )
    layout = ", channels_last" if job.numerics.channels_last else ""
    how = start.config.preprocessing
    show_plan(
        "finetune",
        {
            "model": f"{architecture_name(start.config.model)}, weights {recipe.weights}, "
            f"input {how.height}x{how.width}",
            "learns": f"{recipe.train}: {learning:,} of {everything:,} parameters",
            "classes": f"{len(inputs.classes)} ({start.known_rows} known to the model by name)",
            "images": f"{len(inputs.train):,} to learn from, {held}",
            "steps": f"{job.state.total_steps:,} of {recipe.batch_size} images ({recipe.epochs} epochs)",
            "processes": f"{team.size} on {team.device.type}, {job.workers} decoding workers each",
            "precision": f"{job.numerics.precision}{layout} ({job.numerics.reason})",
            "out": recipe.out,
        },
    )
