"""What an alignment works with, and what it says of itself before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from tldist.align.domains import Domains
from tldist.align.methods import Method
from tldist.align.recipe import AlignRecipe
from tldist.bundle import BundleConfig
from tldist.distributed import Team
from tldist.models.description import architecture_name
from tldist.progress import show_plan, warn
from tldist.runs import RunFolder
from tldist.training.measure import Measurement, measure, predictor, why_not_measurable


@dataclass(frozen=True)
class Job:
    """What an alignment works with; the model is on the team's device."""

    recipe: AlignRecipe
    method: Method
    team: Team
    folder: RunFolder
    model: nn.Module
    config: BundleConfig
    domains: Domains
    workers: int

    @property
    def options(self) -> dict[str, Any]:
        """What the method is given: its defaults, and what the recipe says."""
        seed = {"seed": self.recipe.seed} if "seed" in self.method.options else {}
        return {**self.method.options, **self.recipe.options, **seed}


def show(job: Job) -> None:
    recipe, domains, how = job.recipe, job.domains, job.config.preprocessing
    told = int(domains.told.sum())
    show_plan(
        "align",
        {
            "model": f"{architecture_name(job.config.model)}, input {how.height}x{how.width}",
            "method": ", ".join([recipe.method, *(f"{name} {value}" for name, value in job.options.items())]),
            "source": f"{domains.source.name}: {len(domains.source):,} images of {len(domains.classes)} "
            f"classes, {int(domains.held_out.sum()):,} of them choose the head",
            "target": f"{domains.target.name}: {len(domains.target):,} images, "
            + (f"{told} of them with their labels" if told else "without their labels"),
            "head": recipe.head + (f", weights by {recipe.weights}" if recipe.weights != "none" else ""),
            "report": f"accuracy on {len(domains.test):,} images of {domains.test.name}"
            if domains.test.has_labels
            else "no accuracy: the target has no labels",
            "processes": f"{job.team.size} on {job.team.device.type}, {job.workers} decoding workers each",
            "out": recipe.out,
        },
    )


def measure_target(job: Job, model: nn.Module, classes: tuple[str, ...], when: str) -> Measurement | None:
    """Accuracy on the target, to report; None where it cannot be had, and why is said."""
    if not job.domains.test.has_labels:
        return None  # the plan has said so
    reason = why_not_measurable(job.domains.test, classes, "multiclass")
    if reason:
        warn(f"the accuracy {when} is not measured on {job.domains.test.name}: {reason}")
        return None
    how = job.config.preprocessing
    return measure(
        predictor(model, how),
        job.domains.test,
        classes,
        how,
        job.team,
        batch_size=job.recipe.batch_size,
        workers=job.workers,
        ledger_file=job.folder.path / "bad_target_test_images.jsonl",
        label=f"target {when}",
    )
