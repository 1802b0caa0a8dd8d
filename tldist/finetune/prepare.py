"""Everything that a fine-tuning works with: inputs, numerics, the frozen part, learner, position."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tldist.data.loader import Batch, load_batches, num_workers
from tldist.data.order import StepPlan, seed_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.files import sha256_text
from tldist.finetune.domains import split_domains
from tldist.finetune.frozen import CachedFeatures, FrozenPart, augmentation_of, load_frozen, plan_frozen
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.blocks import cut_blocks, freeze, trainable_blocks
from tldist.models.load import Start, hash_tensors, input_tensor, start_model
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


@dataclass
class Job:
    """A fine-tuning, prepared.

    Attributes:
        recipe, team, folder, inputs: what it was prepared from.
        numerics: how it computes.
        workers: decoding processes of each process.
        frozen_names: parameters and buffers that may not change.
        frozen_before: their hash.
        part: the frozen part, where it is computed once.
        frozen_words: how often the frozen part is computed, and why; empty where nothing is frozen.
        learner: what learns.
        state: the training itself.
        cached_train, cached_validation: features in the place of images.
    """

    recipe: FinetuneRecipe
    team: Team
    folder: RunFolder
    inputs: Inputs
    numerics: Numerics
    workers: int
    frozen_names: list[str]
    frozen_before: str
    part: FrozenPart | None
    frozen_words: str
    learner: Learner
    state: Fit
    cached_train: CachedFeatures | None = None
    cached_validation: CachedFeatures | None = None

    @property
    def model(self) -> nn.Module:
        """The bare module, whole."""
        return self.learner.model

    def train_batches(self, plans: Iterable[StepPlan]) -> Iterator[Batch]:
        """Batches of the train domain: decoded and augmented images, or cached features."""
        if self.cached_train:
            return self.cached_train.batches(plans)
        recipe, inputs = self.recipe, self.inputs
        return load_batches(
            inputs.train,
            plans,
            inputs.start.config.preprocessing,
            classes=inputs.classes,
            augmentation=augmentation_of(recipe),
            views=recipe.augment.views,
            seed=recipe.seed,
            workers=self.workers,
        )

    def validate(self, label: str) -> Measurement:
        """Measure the model as it trains, from cached features where there are some."""
        if not (self.part and self.cached_validation):
            return self.measure(self.numerics.precision, label)
        assert self.inputs.validation is not None
        suffix = self.part.suffix

        @torch.no_grad()
        def predict(features: Tensor) -> Tensor:
            self.model.eval()
            logits: Tensor = suffix(features)
            return logits.float()

        self.team.same_buffers(self.model)
        return measure(
            predict,
            self.inputs.validation,
            self.inputs.classes,
            self.inputs.start.config.preprocessing,
            self.team,
            label=label,
            load=self.cached_validation.batches,
        )

    def measure(self, precision: str, label: str) -> Measurement:
        """Measure the whole model as it is now; called by all processes together."""
        assert self.inputs.validation is not None
        how = self.inputs.start.config.preprocessing
        self.team.same_buffers(self.model)
        predict = predictor(self.model, how, precision=precision, channels_last=self.numerics.channels_last)
        return measure(
            predict,
            self.inputs.validation,
            self.inputs.classes,
            how,
            self.team,
            workers=self.workers,
            label=label,
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
    """Freeze, choose the numerics, cut, wrap by Accelerate, go on from the newest checkpoint."""
    model, how = inputs.start.model.to(team.device), inputs.start.config.preprocessing
    blocks = cut_blocks(model)
    learning = trainable_blocks(blocks, recipe.train)
    frozen = freeze(model, learning)
    frozen_names = [name for name in model.state_dict() if not any(block.owns(name) for block in learning)]
    frozen_before = hash_tensors(model.state_dict(), frozen_names)
    share = -(-recipe.batch_size // (team.size * recipe.gradient_accumulation))
    numerics = settle_numerics(
        recipe.precision, folder.path / "precision.json", model, frozen, (how.height, how.width), team, share
    )
    model.to(memory_format=numerics.memory_format)
    part, words = None, ""
    if frozen_names:
        images = (len(inputs.train), len(inputs.validation) if inputs.validation else 0)
        part, words = plan_frozen(recipe, model, blocks, learning, how, images)
        refusals = [other for able, other in team.gather((part is not None, words)) if not able]
        part, words = (None, refusals[0]) if refusals else (part, words)
    learner = _build_learner(recipe, team, inputs, numerics, frozen, part)
    state = _build_state(recipe, folder, inputs, learner)
    workers = num_workers(recipe.workers, team.local_size)
    job = Job(
        recipe,
        team,
        folder,
        inputs,
        numerics,
        workers,
        frozen_names,
        frozen_before,
        part,
        words,
        learner,
        state,
    )
    state.validate = job.validate if inputs.validation else None
    return job


def load_features(job: Job) -> None:
    """Compute the frozen part, or find it computed; nothing where it runs in every epoch."""
    if job.part is None:
        return
    how, classes = job.inputs.start.config.preprocessing, job.inputs.classes

    def load(domain: Domain, training: bool) -> CachedFeatures:
        assert job.part is not None
        return load_frozen(
            job.part,
            job.recipe,
            domain,
            classes,
            how,
            job.numerics,
            job.team,
            training=training,
            workers=job.workers,
        )

    job.cached_train = load(job.inputs.train, True)
    if job.inputs.validation:
        job.cached_validation = load(job.inputs.validation, False)


def _build_learner(
    recipe: FinetuneRecipe,
    team: Team,
    inputs: Inputs,
    numerics: Numerics,
    frozen: list[nn.Module],
    part: FrozenPart | None,
) -> Learner:
    model, how = inputs.start.model, inputs.start.config.preprocessing
    rule, total = recipe.optimizer, len(inputs.train) * recipe.epochs
    optimizer = build_optimizer(
        model, name=rule.name, lr=rule.lr, weight_decay=rule.weight_decay, momentum=rule.momentum
    )
    accelerator = team.accelerator(numerics.precision)
    wrapped, wrapped_optimizer = accelerator.prepare(part.suffix if part else model, optimizer)
    to_input: Callable[[Tensor], Tensor] = (
        (lambda features: features)
        if part
        else (lambda images: input_tensor(images, how, numerics.memory_format))
    )
    return Learner(
        model=model,
        wrapped=wrapped,
        optimizer=wrapped_optimizer,
        bare_optimizer=optimizer,
        accelerator=accelerator,
        team=team,
        frozen=frozen,
        objective=cross_entropy(recipe.label_smoothing),
        to_input=to_input,
        learning_rate=lambda samples: learning_rate(samples, total, rule.lr, rule.warmup, rule.schedule),
        seed=recipe.seed,
        pieces=recipe.gradient_accumulation,
        clip=rule.clip,
    )


def _build_state(recipe: FinetuneRecipe, folder: RunFolder, inputs: Inputs, learner: Learner) -> Fit:
    position = resume(learner, folder)
    ledger = Ledger(inputs.train, folder.path / LEDGER)
    ledger.found = {int(index): reason for index, reason in position.broken.items()}
    return Fit(
        learner=learner,
        folder=folder,
        position=position,
        ledger=ledger,
        images=len(inputs.train),
        batch_size=recipe.batch_size,
        epochs=recipe.epochs,
        validate=None,
        every_steps=recipe.checkpoint.every_steps,
        keep=recipe.checkpoint.keep,
    )
