"""What a fine-tuning starts from: domains, classes, and a model with its head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tldist.bundle import Task, read_bundle
from tldist.data.order import seed_of
from tldist.distributed import Team
from tldist.domain import Domain, open_domain
from tldist.errors import DomainError, RecipeError
from tldist.files import sha256_text
from tldist.finetune.domains import split_domains
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.load import Start, hash_tensors, names_folder, start_model
from tldist.runs import RunFolder, open_run
from tldist.runtime.preprocess import Preprocessing


@dataclass(frozen=True)
class Inputs:
    """What a fine-tuning starts from.

    Attributes:
        train, validation, test: the domains; no validation where nothing is held out.
        classes: of the task.
        start: the model with its head.
        target: images without labels to adapt to; None: nothing is adapted.
    """

    train: Domain
    validation: Domain | None
    test: Domain | None
    classes: tuple[str, ...]
    start: Start
    target: Domain | None = None

    @property
    def how(self) -> Preprocessing:
        """The model's preprocessing."""
        return self.start.config.preprocessing

    def fingerprints(self) -> dict[str, str]:
        """What identifies them, besides the recipe."""
        held = self.validation.fingerprint if self.validation else ""
        target = {"target": self.target.fingerprint} if self.target else {}
        return {
            "data": sha256_text(self.train.fingerprint + held),
            "model": hash_tensors(self.start.model.state_dict()),
            **target,
        }


def open_finetune(recipe: FinetuneRecipe, team: Team) -> tuple[Inputs, RunFolder]:
    """The inputs, the same on all processes, and the run's folder; called by all of them together."""
    inputs = load_inputs(recipe)
    fingerprints = inputs.fingerprints()
    team.agree(recipe, fingerprints)
    return inputs, team.on_main(lambda: open_run("finetune", recipe.out, recipe, fingerprints))


def load_inputs(recipe: FinetuneRecipe) -> Inputs:
    """Open the domains and build the model; the new head depends on the seed alone.

    Raises:
        RecipeError: a setting that does not go with several classes an image, or with no source.
    """
    target = open_target(recipe)
    if recipe.data is None:
        return _without_source(recipe, target)
    domains = split_domains(recipe.data, recipe.validation, recipe.seed)
    start = _start(recipe, recipe.model, domains.classes)
    if domains.train.is_multilabel and recipe.class_weights != "none":
        raise RecipeError("class_weights=balanced weighs images of one class each; these have several.")
    if domains.train.is_multilabel and target is not None:
        raise RecipeError("adapt.method needs a source of one class an image; these have several.")
    task: Task = "multilabel" if domains.train.is_multilabel else "multiclass"
    start = replace(start, config=replace(start.config, task=task))
    return Inputs(domains.train, domains.validation, domains.test, domains.classes, start, target)


def open_target(recipe: FinetuneRecipe) -> Domain | None:
    """The images to adapt to, without their labels: of the train split, where there are splits."""
    if recipe.adapt.target is None:
        return None
    target = open_domain(recipe.adapt.target, sealed=True).training_split()
    if len(target) < 2:
        raise DomainError(f"{target.name}: {len(target)} images to adapt to; there have to be at least two.")
    return target


def on_the_target(recipe: FinetuneRecipe, inputs: Inputs, bundle: Path) -> Inputs:
    """The same with the target in the place of the source, and a model of the source to go on from.

    The source's validation images stay: they measure.
    """
    assert inputs.target is not None
    start = _start(recipe, str(bundle), inputs.classes)
    return replace(inputs, train=inputs.target, test=None, start=start)


def _without_source(recipe: FinetuneRecipe, target: Domain | None) -> Inputs:
    assert target is not None, "the recipe has seen to it"
    if not names_folder(recipe.model):
        raise RecipeError(
            f"adapt.method={recipe.adapt.method} without data= needs a model of the source: give a bundle as "
            f"model=, not {recipe.model}."
        )
    _, config = read_bundle(recipe.model)
    if config.task != "multiclass" or not config.classes:
        raise RecipeError(f"{recipe.model}: adaptation needs a classifier of one class an image.")
    return Inputs(target, None, None, config.classes, _start(recipe, recipe.model, config.classes), target)


def _start(recipe: FinetuneRecipe, model: str, classes: tuple[str, ...]) -> Start:
    torch.manual_seed(seed_of("init", recipe.seed))
    own = model == recipe.model
    return start_model(
        model,
        recipe.weights if own else "default",
        classes,
        image_size=recipe.image_size if own else None,
        new_head=recipe.head == "new" and own,
        trust_code=recipe.trust_code or not own,
    )
