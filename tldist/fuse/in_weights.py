"""Fusion in weight space: merge the files, load the result, fit its statistics, look at it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tldist.bundle import WEIGHTS, BundleConfig
from tldist.fuse.collapse_check import check_collapse
from tldist.fuse.crew import merge_together
from tldist.fuse.finite import check_finite, probe_images
from tldist.fuse.fit_statistics import fit_statistics
from tldist.fuse.job import Fused, Job
from tldist.fuse.rebuild import rebuild_head
from tldist.fuse.weights.files import Weights as Files
from tldist.fuse.weights.method import Method, Settings
from tldist.fuse.weights.rows import RowPlan, plan_rows
from tldist.fuse.weights.targets import Fusion
from tldist.models.description import build_model, with_outputs
from tldist.models.heads import find_head
from tldist.models.weights import Weights, load_into, read_tensors
from tldist.training.measure import Measurement


@dataclass(frozen=True)
class Merge:
    """One merge of some of a job's models.

    Attributes:
        method, settings: how; the settings have one weight a member.
        members: numbers of the parents that take part.
        files: their tensors, where they are not the bundles' own (permuted ones); else empty.
        aids: statistics that go with each member.
    """

    method: Method
    settings: Settings
    members: tuple[int, ...]
    files: tuple[Files, ...] = ()
    aids: tuple[Files, ...] = ()


def whole_merge(job: Job) -> Merge:
    """All parents, by the method and the settings of the recipe."""
    return Merge(job.method, job.settings, tuple(range(len(job.parents))))


@dataclass(frozen=True)
class Built:
    """A merged model, ready to be measured.

    Attributes:
        model, config: on the team's device, in evaluation mode; without lineage and metrics.
        shares: of each of the job's models, the base first.
        batches: that fitted its statistics; 0: none.
        notes: what else there is to say, as plain data.
        merged: what ``look`` gave before the statistics were fitted.
    """

    model: nn.Module
    config: BundleConfig
    shares: tuple[float, ...]
    batches: int
    notes: dict[str, Any]
    merged: Measurement | None

    @property
    def changed(self) -> bool:
        """Whether it is another model than ``merged`` was measured on."""
        return bool(self.batches or self.notes) or self.merged is None


def fuse_in_weights(job: Job, merge: Merge) -> Fused:
    """Merge, fit the statistics, measure on the test images; called by all processes together."""

    def measured(label: str) -> Callable[[nn.Module, BundleConfig], Measurement | None]:
        return lambda model, config: job.measure(model, config, job.test, label) if job.test else None

    built = build(job, merge, look=measured("merged"))
    check_collapse(job, built.model, built.config)
    after = measured("result")(built.model, built.config) if built.changed else built.merged
    return Fused(built.model, built.config, built.shares, built.notes, built.merged, built.batches, after)


def build(
    job: Job,
    merge: Merge,
    *,
    most_batches: int | None = None,
    look: Callable[[nn.Module, BundleConfig], Measurement | None] = lambda model, config: None,
) -> Built:
    """From the files to a model: merged, its statistics fitted, its head rebuilt where that is asked for.

    Args:
        job, merge: what is merged.
        most_batches: that fit its statistics; None: as the recipe says.
        look: measures it before they are fitted.

    Raises:
        ModelError: a tensor or an output is not finite.
    """
    model, config, fusion = merged_model(job, merge)
    probes = probe_images(config.preprocessing, job.data).to(job.team.device)
    check_finite(model, config.preprocessing, probes)
    rebuilds = job.labels.heads == "rebuild"
    merged = None if rebuilds else look(model, config)
    shares = _shares(job, merge, fusion)
    batches, notes = fit_statistics(job, model, config, shares, most_batches)
    if rebuilds:
        model, config, more = rebuild_head(job, model, config)
        notes = {**notes, **more}
    if batches or notes:
        check_finite(model, config.preprocessing, probes)
    return Built(model, config, shares, batches, notes, merged)


def _shares(job: Job, merge: Merge, fusion: Fusion) -> tuple[float, ...]:
    """Of all of the job's models: nothing for those that take no part."""
    first = len(job.everyone) - len(job.parents)
    members = [first + number for number in merge.members]
    places = [0, *members] if fusion.base else members
    shares = [0.0] * len(job.everyone)
    for place, share in zip(places, fusion.shares):
        shares[place] = share
    return tuple(shares)


def keep_parent(job: Job, number: int) -> Fused:
    """One of the parents as the result: where no merge is better."""
    parent = job.parents[number]
    model, config = job.load(parent)
    after = job.measure(model, config, job.test, parent.label) if job.test else None
    kept = replace(config, lineage={}, metrics={}, files={})
    shares = [0.0] * len(job.everyone)
    shares[len(job.everyone) - len(job.parents) + number] = 1.0
    return Fused(model.eval(), kept, tuple(shares), {"kept": parent.label}, after, 0, after)


def merged_model(job: Job, merge: Merge) -> tuple[nn.Module, BundleConfig, Fusion]:
    """Merge the files and load the result; called by all processes together.

    Returns:
        The model on the team's device, in evaluation mode; its configuration; what was merged.

    Raises:
        BundleError: the models do not fit together.
        ModelError: a merged number is not finite.
    """
    config = merged_config(job)
    model = build_model(config.model, trust_code=job.recipe.trust_code)
    fusion = _fusion(job, merge, find_head(model)[0])
    folder = job.work / "merged"
    merge_together(fusion, folder, job.team)
    load_into(model, Weights("the merged model", read_tensors(folder / WEIGHTS)))
    job.team.wait()
    job.team.on_main(lambda: shutil.rmtree(folder))
    return model.to(job.team.device).eval(), config, fusion


def merged_config(job: Job) -> BundleConfig:
    """The first parent's architecture and preprocessing, with the classes of the result (before a head is
    rebuilt: of all models)."""
    first, classes = job.parents[0].config, merged_classes(job)
    described = with_outputs(first.model, len(classes)) if classes else first.model
    return BundleConfig(described, classes, first.preprocessing, task=first.task)


def merged_classes(job: Job) -> tuple[str, ...]:
    """Names of the rows of the merged head."""
    if job.labels.heads == "rebuild":
        return tuple(dict.fromkeys(name for names in job.labels.known for name in names))
    return job.labels.classes


def _fusion(job: Job, merge: Merge, head: str) -> Fusion:
    parents = [job.parents[number] for number in merge.members]
    base = job.base if "base" in merge.method.uses else None
    return Fusion(
        merge.files or [parent.weights for parent in parents],
        base.weights if base else None,
        merge.method,
        merge.settings,
        _rows(job, merge, head, base.config.classes if base else None),
        merge.aids,
    )


def _rows(job: Job, merge: Merge, head: str, base: Sequence[str] | None) -> dict[str, RowPlan]:
    """How the head's rows come together; nothing where all models have the result's classes in its order."""
    classes = merged_classes(job)
    known = [job.labels.known[number] for number in merge.members]
    own_base = base is None or tuple(base) == classes
    if not classes or (own_base and all(names == classes for names in known)):
        return {}
    plan = plan_rows(classes, known, base)
    return dict.fromkeys(head_rows(job, head), plan)


def head_rows(job: Job, head: str) -> list[str]:
    """Names of the tensors with one row a class; none of models without classes."""
    entries = job.parents[0].weights.entries
    return [name for name in (f"{head}.weight", f"{head}.bias") if merged_classes(job) and name in entries]


def clear_work(work: Path) -> None:
    """Remove what was needed meanwhile."""
    shutil.rmtree(work, ignore_errors=True)
