"""Fusion in weight space: merge the files, load the result, fit its statistics, look at it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tldist.bundle import WEIGHTS, BundleConfig
from tldist.fuse.crew import merge_together
from tldist.fuse.finite import check_finite, probe_images
from tldist.fuse.fit_statistics import fit_statistics
from tldist.fuse.job import Fused, Job
from tldist.fuse.rebuild import rebuild_head
from tldist.fuse.weights.files import Weights as Files
from tldist.fuse.weights.methods import Method, Settings
from tldist.fuse.weights.rows import RowPlan, plan_rows
from tldist.fuse.weights.stream import Fusion
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


def fuse_in_weights(job: Job, merge: Merge) -> Fused:
    """Merge, fit the statistics, measure; called by all processes together."""
    model, config, fusion = merged_model(job, merge)
    return finish_model(job, model, config, fusion.shares)


def finish_model(job: Job, model: nn.Module, config: BundleConfig, shares: tuple[float, ...]) -> Fused:
    """From merged weights to a result: statistics, a new head where it is asked for, checks, measurements."""
    probes = probe_images(config.preprocessing, job.data).to(job.team.device)
    check_finite(model, config.preprocessing, probes)
    rebuilds = job.labels.heads == "rebuild"
    merged = None if rebuilds else measured(job, model, config, "merged")
    batches, notes = fit_statistics(job, model, config)
    if rebuilds:
        model, config, more = rebuild_head(job, model, config)
        notes = {**notes, **more}
    if batches or rebuilds:
        check_finite(model, config.preprocessing, probes)
    after = measured(job, model, config, "result") if batches or rebuilds else merged
    return Fused(model, config, shares, notes, merged, batches, after)


def measured(job: Job, model: nn.Module, config: BundleConfig, label: str) -> Measurement | None:
    """On the test images, where there are some."""
    return job.measure(model, config, job.test, label) if job.test else None


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
    fusion = _fusion(job, merge, find_head(model)[0], _tied(model))
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


def _fusion(job: Job, merge: Merge, head: str, tied: dict[str, str]) -> Fusion:
    parents = [job.parents[number] for number in merge.members]
    base = job.base if "base" in merge.method.uses else None
    return Fusion(
        merge.files or [parent.weights for parent in parents],
        base.weights if base else None,
        merge.method,
        merge.settings,
        _rows(job, merge, head, base.config.classes if base else None),
        merge.aids,
        tied,
    )


def _rows(job: Job, merge: Merge, head: str, base: Sequence[str] | None) -> dict[str, RowPlan]:
    """How the head's rows come together; nothing where all models have the result's classes in its order."""
    classes = merged_classes(job)
    known = [job.labels.known[number] for number in merge.members]
    own_base = base is None or tuple(base) == classes
    if not classes or (own_base and all(names == classes for names in known)):
        return {}
    plan = plan_rows(classes, known, base)
    entries = job.parents[0].weights.entries
    return {name: plan for name in (f"{head}.weight", f"{head}.bias") if name in entries}


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one, to that one's name."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def clear_work(work: Path) -> None:
    """Remove what was needed meanwhile."""
    shutil.rmtree(work, ignore_errors=True)
