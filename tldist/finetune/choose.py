"""Which of the candidates becomes the result of an adaptation, settled on disk before any label is opened."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from tldist.adaptation.choice import (
    SCORERS,
    SOURCE_ONLY,
    Evidence,
    Scorer,
    answered_classes,
    choose,
    combine_ranks,
    source_accuracy,
    why_refused,
)
from tldist.adaptation.observe import Observed, observe
from tldist.data.order import epoch_order
from tldist.distributed import Team
from tldist.domain import Domain, open_domain
from tldist.errors import DomainError, Preempted, RecipeError
from tldist.files import read_json, write_json
from tldist.finetune.recipe import FinetuneRecipe
from tldist.methods import find_method
from tldist.progress import say, warn
from tldist.runs import RunFolder
from tldist.runtime.preprocess import Preprocessing
from tldist.training.measure import measure, predictor, why_not_measurable
from tldist.training.signals import StopFlag

CHOICE = "choice.json"
MOST_IMAGES = 20_000
"""Of each domain that scorers look at; of more, so many at random."""
TARGET_ACCURACY = "target_accuracy"
"""What chooses where the target's labels may be used."""


@dataclass(frozen=True)
class Candidate:
    """A model that may become the result.

    Attributes:
        name: `SOURCE_ONLY`, ``epoch-N`` or ``adabn``.
        load: gives it, on the team's device.
        step: of its checkpoint; None: it has none here.
    """

    name: str
    load: Callable[[], nn.Module]
    step: int | None = None


@dataclass(frozen=True)
class Judge:
    """What candidates are judged on.

    Attributes:
        recipe, team, folder, stop: of the run.
        how, classes: of the model.
        target: images without labels.
        held: labelled images of the source that nothing has learned from; None: there are none.
        workers: decoding processes.
    """

    recipe: FinetuneRecipe
    team: Team
    folder: RunFolder
    stop: StopFlag
    how: Preprocessing
    classes: tuple[str, ...]
    target: Domain
    held: Domain | None
    workers: int


def find_scorers(names: Sequence[str]) -> dict[str, Scorer]:
    """Scorers by name, or of one's own by dotted path; all there are where none is named.

    Raises:
        RecipeError: unknown.
    """
    return {name: find_method(name, SCORERS) for name in names} if names else dict(SCORERS)


def settle(judge: Judge, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Choose, and write ``RUN/choice.json``; an earlier choice stands. Called by all processes together.

    Args:
        judge: what they are judged on.
        candidates: source-only first, then from the earliest to the last.

    Returns:
        The choice as plain JSON data: what was chosen, by what, and all candidates with their scores.
    """
    file = judge.folder.path / CHOICE
    if not judge.team.on_main(file.is_file):
        choice = _choose(judge, candidates)
        judge.team.on_main(lambda: write_json(file, choice))
    found: dict[str, Any] = judge.team.on_main(lambda: read_json(file, RecipeError, "choice of a run"))
    return found


def _choose(judge: Judge, candidates: Sequence[Candidate]) -> dict[str, Any]:
    settings = judge.recipe.adapt
    assert settings.target is not None
    scorers, opened = find_scorers(settings.scorers), None
    if settings.target.labels == "use":
        say("the labels of the target choose (adapt.target.labels=use)")
        opened = _opened(judge)
    rows: list[dict[str, Any]] = []
    plain: Evidence | None = None
    for candidate in candidates:
        if judge.team.any(judge.stop.requested):
            raise Preempted("told to stop while choosing; the same command goes on.")
        model = candidate.load()
        judge.team.same_buffers(model)
        seen = _look(judge, candidate.name, model)
        plain = plain or seen
        rows.append(
            {
                "name": candidate.name,
                "step": candidate.step,
                "scores": _by_labels(judge, candidate.name, model, opened)
                if opened
                else {name: float(scorer(seen)) for name, scorer in scorers.items()},
                "refused": None if candidate.name == SOURCE_ONLY else why_refused(seen, plain),
                "answered_classes": answered_classes(seen.target_logits),
                "source_accuracy": source_accuracy(seen),
            }
        )
    return {
        "method": settings.method,
        "labels": settings.target.labels,
        "scorers": [TARGET_ACCURACY] if opened else list(scorers),
        "target_images": len(judge.target),
        **_verdict(rows),
    }


def _verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        if row["refused"]:
            warn(f"{row['name']} may not be chosen: it {row['refused']}")
    scores = {row["name"]: row["scores"] for row in rows}
    chosen, ranks = choose(scores, [row["name"] for row in rows if row["refused"]]), combine_ranks(scores)
    return {
        "chosen": chosen,
        "promoted": chosen != SOURCE_ONLY,
        "candidates": [{**row, "mean_rank": ranks[row["name"]]} for row in rows],
    }


def _look(judge: Judge, name: str, model: nn.Module) -> Evidence:
    """What scorers see of a model."""

    def seen(domain: Domain, label: str) -> Observed:
        return observe(
            model, judge.how, sample(domain, judge.recipe.seed), judge.team,
            classes=judge.classes, workers=judge.workers, label=f"{name}: {label}",
        )  # fmt: skip

    target = seen(judge.target, "target")
    source = seen(judge.held, "source") if judge.held else None
    if source is None:
        nothing = np.empty(0, dtype=np.int64)
        source = Observed(target.features[:0], target.logits[:0], nothing, nothing)
    return Evidence(source.features, source.logits, source.labels, target.features, target.logits)


def sample(domain: Domain, seed: int) -> Domain:
    """At most `MOST_IMAGES` of a domain, at random."""
    return domain.subset(np.sort(epoch_order(seed, 0, len(domain))[:MOST_IMAGES]))


def _opened(judge: Judge) -> Domain:
    """The target with its labels: only where the recipe lets them be used.

    Raises:
        DomainError: it has none, or classes that the model does not know.
    """
    settings = judge.recipe.adapt.target
    assert settings is not None
    opened = open_domain(settings).training_split()
    reason = why_not_measurable(opened, judge.classes, "multiclass")
    if reason:
        raise DomainError(f"adapt.target.labels=use: {opened.name} cannot choose: {reason}.")
    return sample(opened, judge.recipe.seed)


def _by_labels(judge: Judge, name: str, model: nn.Module, opened: Domain) -> dict[str, float]:
    found = measure(
        predictor(model, judge.how), opened, judge.classes, judge.how, judge.team,
        workers=judge.workers, label=f"{name}: labels of the target",
    )  # fmt: skip
    return {TARGET_ACCURACY: found.accuracy}
