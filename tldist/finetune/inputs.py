"""What a fine-tuning starts from: domains, classes, and a model with its head."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tldist.bundle import Task
from tldist.data.order import seed_of
from tldist.domain import Domain
from tldist.errors import RecipeError
from tldist.files import sha256_text
from tldist.finetune.domains import split_domains
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.load import Start, hash_tensors, start_model
from tldist.runtime.preprocess import Preprocessing


@dataclass(frozen=True)
class Inputs:
    """What a fine-tuning starts from.

    Attributes:
        train, validation, test: the domains; no validation where nothing is held out.
        classes: of the task.
        start: the model with its head.
    """

    train: Domain
    validation: Domain | None
    test: Domain | None
    classes: tuple[str, ...]
    start: Start

    @property
    def how(self) -> Preprocessing:
        """The model's preprocessing."""
        return self.start.config.preprocessing

    def fingerprints(self) -> dict[str, str]:
        """What identifies them, besides the recipe."""
        held = self.validation.fingerprint if self.validation else ""
        return {
            "data": sha256_text(self.train.fingerprint + held),
            "model": hash_tensors(self.start.model.state_dict()),
        }


def load_inputs(recipe: FinetuneRecipe) -> Inputs:
    """Open the domains and build the model; the new head depends on the seed alone.

    Raises:
        RecipeError: a setting that does not go with several classes an image.
    """
    domains = split_domains(recipe.data, recipe.validation, recipe.seed)
    torch.manual_seed(seed_of("init", recipe.seed))
    start = start_model(
        recipe.model,
        recipe.weights,
        domains.classes,
        image_size=recipe.image_size,
        new_head=recipe.head == "new",
        trust_code=recipe.trust_code,
    )
    if domains.train.is_multilabel and recipe.class_weights != "none":
        raise RecipeError("class_weights=balanced weighs images of one class each; these have several.")
    task: Task = "multilabel" if domains.train.is_multilabel else "multiclass"
    start = replace(start, config=replace(start.config, task=task))
    return Inputs(domains.train, domains.validation, domains.test, domains.classes, start)
