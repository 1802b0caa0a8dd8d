"""Which of the trials becomes the result of an adaptation, settled on disk before any label is opened."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tldist.adaptation.observe import Observed, observe, observe_mixtures
from tldist.data.order import epoch_order
from tldist.distributed import Team
from tldist.domain import Domain, open_domain
from tldist.errors import DomainError, Preempted, RecipeError, close_matches
from tldist.features.scorers.candidate import SCORERS, Candidate, SourceEvidence, judge
from tldist.features.scorers.choose import SOURCE_ONLY, choose
from tldist.features.scorers.mixing import mix_consistency
from tldist.files import read_json, write_json
from tldist.finetune.recipe import FinetuneRecipe
from tldist.progress import say
from tldist.runs import RunFolder
from tldist.runtime.preprocess import Preprocessing
from tldist.training.calibrate import fit_temperature
from tldist.training.measure import measure, predictor, why_not_measurable
from tldist.training.signals import StopFlag

CHOICE = "choice.json"
MOST_IMAGES = 10_000
"""Of each domain that scorers look at; of more, so many at random."""
TARGET_ACCURACY = "target_accuracy"
"""What chooses where the target's labels may be used."""


@dataclass(frozen=True)
class Trial:
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
class Bench:
    """What the trials are judged on.

    Attributes:
        recipe, team, folder, stop: of the run.
        how, classes: of the model.
        target: images without labels.
        learned, held: labelled images of the source, those that all trials have learned from and those that
            none has; None: there are none.
        workers: decoding processes.
    """

    recipe: FinetuneRecipe
    team: Team
    folder: RunFolder
    stop: StopFlag
    how: Preprocessing
    classes: tuple[str, ...]
    target: Domain
    learned: Domain | None
    held: Domain | None
    workers: int

    def observe(self, model: nn.Module, domain: Domain, label: str) -> Observed:
        """What a model says of a sample of a domain."""
        return observe(
            model, self.how, sample(domain, self.recipe.seed), self.team,
            classes=self.classes, workers=self.workers, label=label,
        )  # fmt: skip

    def ask_to_go_on(self) -> None:
        """`Preempted` where a process was asked to stop."""
        if self.team.any(self.stop.requested):
            raise Preempted("told to stop while choosing; the same command goes on.")


def check_scorers(names: Sequence[str]) -> None:
    """`RecipeError` where a scorer is unknown."""
    for name in names:
        if name not in SCORERS:
            raise RecipeError(f"adapt.scorers={name}: unknown. {close_matches(name, SCORERS)}")


def settle(bench: Bench, trials: Sequence[Trial]) -> dict[str, Any]:
    """Choose, and write ``RUN/choice.json``; an earlier choice among the same trials stands. Called by all
    processes together.

    Args:
        bench: what they are judged on.
        trials: source-only first, then from the earliest to the last.

    Returns:
        The choice as plain JSON data: what was chosen, by what, and all trials with their scores, the best
        first.
    """
    file = bench.folder.path / CHOICE
    if not bench.team.on_main(lambda: _stands(file, trials)):
        adapt = bench.recipe.adapt
        assert adapt.target is not None
        by_labels = adapt.target.labels == "use"
        found = _by_labels(bench, trials) if by_labels else _by_scorers(bench, trials)
        steps = {trial.name: trial.step for trial in trials}
        rows = [_as_json(row, steps[row["name"]]) for row in found.pop("ranking")]
        choice = {
            "method": adapt.method,
            "labels": adapt.target.labels,
            "target_images": len(bench.target),
            "promoted": found["chosen"] != SOURCE_ONLY,
            **found,
            "candidates": rows,
        }
        bench.team.on_main(lambda: write_json(file, choice))
    settled: dict[str, Any] = bench.team.on_main(lambda: read_json(file, RecipeError, "choice of a run"))
    return settled


def _stands(file: Path, trials: Sequence[Trial]) -> bool:
    """Whether there is a choice among these trials; with more epochs there are others."""
    if not file.is_file():
        return False
    rows = read_json(file, RecipeError, "choice of a run")["candidates"]
    return {(row["name"], row["step"]) for row in rows} == {(trial.name, trial.step) for trial in trials}


def _as_json(row: dict[str, Any], step: int | None) -> dict[str, Any]:
    """A trial's row with its step; what is not a number is None, for JSON has no NaN."""
    scores = {name: v if v is not None and math.isfinite(v) else None for name, v in row["scores"].items()}
    return {**row, "scores": scores, "step": step}


def _by_scorers(bench: Bench, trials: Sequence[Trial]) -> dict[str, Any]:
    """Without labels of the target: see `tldist.features.scorers.choose`."""
    judged = [_judge(bench, trial) for trial in trials]
    names = bench.recipe.adapt.scorers or tuple(SCORERS)
    prior = _class_shares(bench)
    return bench.team.on_main(lambda: choose(judged, prior=prior, scorers=names).to_dict())


def _judge(bench: Bench, trial: Trial) -> Candidate:
    """All scores of a trial. Most are of how sure its answers are: its probabilities are calibrated on the
    source first (arXiv:1706.04599), as those of its bundle will be, or a loss that shrinks all logits looked
    worse than it is, and one that blows them up better."""
    bench.ask_to_go_on()
    model, seed = trial.load(), bench.recipe.seed
    bench.team.same_buffers(model)
    target = bench.observe(model, bench.target, f"{trial.name}: target")
    source, temperature = None, 1.0
    if bench.learned is not None and bench.held is not None:
        learned = bench.observe(model, bench.learned, f"{trial.name}: source")
        held = bench.observe(model, bench.held, f"{trial.name}: held out")
        temperature = bench.team.on_main(lambda: _temperature(held))
        source = SourceEvidence(learned.features, held.features, held.logits / temperature, held.labels)
    pictures = sample(bench.target, seed).subset(target.indices)
    partner, mixed = observe_mixtures(
        model, bench.how, pictures, bench.team, seed=seed, workers=bench.workers, label=f"{trial.name}: mixed"
    )
    answers = torch.from_numpy(target.logits).argmax(1)
    return bench.team.on_main(
        lambda: judge(
            trial.name,
            target.logits / temperature,
            target_features=target.features,
            source=source,
            mixed=mix_consistency(answers, partner, mixed),
            seed=seed,
        )
    )


def _temperature(seen: Observed) -> float:
    return fit_temperature(torch.from_numpy(seen.logits), torch.from_numpy(seen.labels))


def _class_shares(bench: Bench) -> Tensor | None:
    """float64 (K,), of the source's images; None: there are none."""
    if bench.learned is None:
        return None
    labels = bench.learned.labels_in(bench.classes)
    return torch.from_numpy(np.bincount(labels, minlength=len(bench.classes)) / len(labels))


def sample(domain: Domain, seed: int) -> Domain:
    """At most `MOST_IMAGES` of a domain, at random."""
    return domain.subset(np.sort(epoch_order(seed, 0, len(domain))[:MOST_IMAGES]))


def _by_labels(bench: Bench, trials: Sequence[Trial]) -> dict[str, Any]:
    """By the accuracy on the target's train images; of equal ones source-only, then the earliest."""
    say("the labels of the target choose (adapt.target.labels=use)")
    opened = _opened(bench)
    rows: list[dict[str, Any]] = []
    for trial in trials:
        bench.ask_to_go_on()
        model = trial.load()
        bench.team.same_buffers(model)
        found = measure(
            predictor(model, bench.how), opened, bench.classes, bench.how, bench.team,
            workers=bench.workers, label=f"{trial.name}: labels of the target",
        )  # fmt: skip
        rows.append({"name": trial.name, "scores": {TARGET_ACCURACY: found.accuracy}})
    rows.sort(key=lambda row: -row["scores"][TARGET_ACCURACY])
    chosen = rows[0]["name"]
    ranking = [{**row, "chosen": row["name"] == chosen} for row in rows]
    return {"chosen": chosen, "scorers": [TARGET_ACCURACY], "left_out": {}, "ranking": ranking}


def _opened(bench: Bench) -> Domain:
    """The target with its labels: only where the recipe lets them be used.

    Raises:
        DomainError: it has none, or classes that the model does not know.
    """
    settings = bench.recipe.adapt.target
    assert settings is not None
    opened = open_domain(settings).training_split()
    reason = why_not_measurable(opened, bench.classes, "multiclass")
    if reason:
        raise DomainError(f"adapt.target.labels=use: {opened.name} cannot choose: {reason}.")
    return sample(opened, bench.recipe.seed)
