"""A fusion, prepared: its models, its domains, and how good a model is on them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from tldist.bundle import BundleConfig
from tldist.data.keep import KeptBatches
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.fuse.labels import ClassPlan
from tldist.fuse.parents import Parent, agreed_statistics
from tldist.fuse.recipe import FuseRecipe
from tldist.fuse.statistics.walk import Walk
from tldist.fuse.weights.method import Method, Settings
from tldist.models.load import load_bundle
from tldist.progress import warn
from tldist.runs import RunFolder
from tldist.runtime.preprocess import Preprocessing
from tldist.training.measure import Measurement, measure, predictor, why_not_measurable

_SAMPLES = 1024


@dataclass(frozen=True)
class Fused:
    """What a method hands over.

    Attributes:
        model: on the team's device, in evaluation mode.
        config: what it is, without lineage and metrics.
        shares: of every model that has one, in the order of the job's ``everyone``; empty where there are
            none (of outputs, by distillation).
        notes: for summary and lineage, as plain JSON data.
        merged: measured before its statistics were fitted, where they were.
        batches: that fitted its statistics; 0: none.
        after: measured as it is, where that has been done already.
    """

    model: nn.Module
    config: BundleConfig
    shares: tuple[float, ...] = ()
    notes: dict[str, Any] = field(default_factory=dict)
    merged: Measurement | None = None
    batches: int = 0
    after: Measurement | None = None


@dataclass(frozen=True)
class Job:
    """What a fusion works with.

    Attributes:
        recipe, team, folder: of the run.
        method, settings: in weight space; of other families only the weights count.
        parents: the models, in order.
        base: the common ancestor, where the method uses it.
        data: the target domain; None where none was given.
        sources: of each parent, the domain that it was trained on; empty where they were not given.
        labels: which classes the result has.
        workers: decoding processes of each process.
    """

    recipe: FuseRecipe
    team: Team
    folder: RunFolder
    method: Method
    settings: Settings
    parents: list[Parent]
    base: Parent | None
    data: Domain | None
    sources: list[Domain]
    labels: ClassPlan
    workers: int

    @property
    def everyone(self) -> list[Parent]:
        """The models that may have a share in the result, the base first."""
        return [self.base, *self.parents] if self.base else self.parents

    @property
    def work(self) -> Path:
        """Where what is needed meanwhile lies."""
        return self.folder.path / "work"

    @cached_property
    def train(self) -> Domain | None:
        """The images that statistics come from."""
        return self.data.training_split() if self.data else None

    @cached_property
    def test(self) -> Domain | None:
        """The labelled images that parents and result are measured on; None: nothing is measured."""
        return self.data.evaluation_split() if self.data and self.data.has_labels else None

    @cached_property
    def validation(self) -> Domain | None:
        """The labelled images that choices are made on: val, where there is a test split beside it."""
        if self.data is None or self.test is None:
            return None
        return self.data.split("val") if {"val", "test"} <= self.data.split_counts.keys() else self.test

    @cached_property
    def unmeasured(self) -> Domain | None:
        """Labelled images that shares are fitted on: val where there is a test split too, else train."""
        if self.validation is not self.test:
            return self.validation
        return self.train if self.test is not None else None

    @cached_property
    def agreed(self) -> set[str]:
        """BatchNorm layers whose statistics are the same in all models."""
        return agreed_statistics(self.everyone)

    @cached_property
    def _kept(self) -> dict[tuple[str, Preprocessing], KeptBatches]:
        return {}

    @cached_property
    def _scores(self) -> dict[str, dict[str, Measurement]]:
        return {}

    def batches(self, domain: Domain, how: Preprocessing) -> KeptBatches:
        """The images of a domain, decoded once for all models that see them alike."""
        key = (domain.fingerprint, how)
        if key not in self._kept:
            self._kept[key] = KeptBatches(domain, how, workers=self.workers)
        return self._kept[key]

    def walk(self, samples: int = _SAMPLES) -> Walk:
        """Which images statistics are taken from: at most ``samples`` where the recipe does not say."""
        recipe = self.recipe
        return Walk(recipe.samples or samples, recipe.batch_size, recipe.seed, self.workers)

    def measure(
        self, model: nn.Module, config: BundleConfig, domain: Domain, label: str
    ) -> Measurement | None:
        """How good a model is on a domain; None, and it is said why, where that cannot be measured."""
        reason = why_not_measurable(domain, config.classes, config.task)
        if reason:
            warn(f"{label} is not measured on {domain.name}: {reason}")
            return None
        how = config.preprocessing
        return measure(
            predictor(model, how),
            domain,
            config.classes,
            how,
            self.team,
            batch_size=self.recipe.batch_size,
            ledger_file=self.folder.path / "bad_test_images.jsonl",
            label=label,
            load=self.batches(domain, how).labelled(config.classes),
        )

    def measure_parents(self, domain: Domain | None) -> dict[str, Measurement]:
        """Every model on a domain, one at a time in memory; those that cannot be measured are left out."""
        if domain is None:
            return {}
        if domain.fingerprint not in self._scores:
            by_label = {parent.label: parent for parent in self.everyone}
            found = {
                label: self.measure(*self.load(parent), domain, label) for label, parent in by_label.items()
            }
            self._scores[domain.fingerprint] = {label: m for label, m in found.items() if m is not None}
        return self._scores[domain.fingerprint]

    def load(self, parent: Parent) -> tuple[nn.Module, BundleConfig]:
        """A parent's model, on the team's device."""
        model, config = load_bundle(parent.folder, trust_code=self.recipe.trust_code, verify=False)
        return model.to(self.team.device), config
