"""Fuse bundles: read, check, plan, fuse, measure, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tldist import distributed
from tldist.bundle import parent_record
from tldist.data.loader import num_workers
from tldist.distributed import Team
from tldist.domain import open_domain
from tldist.files import canonical_json, sha256_text
from tldist.fuse.aids import with_aids
from tldist.fuse.composites import fuse_features, fuse_outputs
from tldist.fuse.distilled import fuse_by_distillation
from tldist.fuse.in_weights import clear_work, fuse_in_weights, whole_merge
from tldist.fuse.job import Fused, Job
from tldist.fuse.labels import Choice, Heads, plan_classes
from tldist.fuse.parents import check_fit, check_tasks, read_parents
from tldist.fuse.plan import show_job
from tldist.fuse.recipe import FuseRecipe
from tldist.fuse.search import search
from tldist.fuse.selection import best_of_curve, greedy_soup
from tldist.fuse.settings import (
    COMPOSITES,
    check_recipe,
    make_settings,
    say_unused,
    used_settings,
    weight_method,
)
from tldist.fuse.verdict import outcome_of
from tldist.models.load import save_bundle
from tldist.progress import warn
from tldist.runs import BUNDLE, Outcome, RunFolder, open_run, recorded
from tldist.training.batchnorm import batchnorm_layers
from tldist.training.measure import Measurement

FAMILIES: dict[str, Callable[[Job], Fused]] = {
    "ensemble": fuse_outputs,
    "concat": fuse_features,
    "distill": fuse_by_distillation,
    "greedy_soup": greedy_soup,
    "search": search,
}
"""The methods that are not one merge in weight space."""


def fuse_bundles(recipe: FuseRecipe) -> Outcome:
    """Make one bundle of several; the same call again says that it is done.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    method = weight_method(recipe.method)
    check_recipe(recipe, method)
    say_unused(recipe, used_settings(recipe.method, method))
    team = distributed.start()
    job = _read(recipe, team)
    inputs = _identities(job)
    team.agree(recipe, inputs)
    folder = team.on_main(lambda: open_run("fuse", recipe.out, recipe, inputs))
    if folder.finished:
        return outcome_of(folder, f"{folder.path} is finished already.")
    job = replace(job, folder=folder)
    with recorded(folder, team.is_main):
        show_job(job)
        before = job.measure_parents(job.test)
        fused = FAMILIES.get(recipe.method, _merge)(job)
        _compare(fused)
        _finish(job, fused, before)
    return outcome_of(folder, "")


def _merge(job: Job) -> Fused:
    """One merge in weight space, or the best of a curve of them."""
    if job.recipe.curve and "alpha" in job.method.uses:
        return best_of_curve(job)
    merge, notes = with_aids(job, whole_merge(job))
    fused = fuse_in_weights(job, merge)
    return replace(fused, notes={**notes, **fused.notes})


def _read(recipe: FuseRecipe, team: Team) -> Job:
    """Models and domains, checked against each other."""
    method = weight_method(recipe.method)
    parents = read_parents(recipe.bundles)
    with_base = recipe.base is not None and "base" in used_settings(recipe.method, method)
    base = read_parents([recipe.base])[0] if recipe.base and with_base else None
    everyone = [*parents, base] if base else parents
    check_tasks(everyone)
    if recipe.method not in COMPOSITES:
        check_fit(everyone)
    data = open_domain(recipe.data) if recipe.data else None
    target = data.used_classes if data is not None and data.has_labels else None
    return Job(
        recipe=recipe,
        team=team,
        folder=RunFolder(recipe.out, "fuse"),
        method=method,
        settings=make_settings(recipe, method),
        parents=parents,
        base=base,
        data=data,
        sources=[open_domain(path) for path in recipe.sources or ()],
        labels=plan_classes(
            [(parent.label, parent.config.classes) for parent in parents],
            *_classes_rule(recipe),
            target,
        ),
        workers=num_workers(recipe.workers, team.local_size),
    )


def _classes_rule(recipe: FuseRecipe) -> tuple[Heads, Choice]:
    """How heads come together; what stays side by side has its own."""
    fixed: dict[str, tuple[Heads, Choice]] = {
        "concat": ("rebuild", "target"),
        "ensemble": ("merge", recipe.classes),
        "distill": ("merge", "union"),
    }
    return fixed.get(recipe.method, (recipe.heads, recipe.classes))


def _identities(job: Job) -> dict[str, str]:
    return {
        "models": sha256_text(canonical_json([parent.config.identity for parent in job.parents])),
        "base": job.base.config.identity if job.base else "none",
        "data": job.data.fingerprint if job.data else "none",
        "sources": sha256_text(canonical_json([source.fingerprint for source in job.sources])),
    }


def _compare(fused: Fused) -> None:
    """Say it where re-estimation has done harm, as a small sample can; labels do not choose in silence."""
    merged, after = fused.merged, fused.after
    if merged and after and fused.batches and after.accuracy < merged.accuracy:
        warn(
            f"with re-estimated statistics the accuracy is {after.accuracy:.4f}, with pooled ones it was "
            f"{merged.accuracy:.4f}. More images may help; recalibrate_batches=0 keeps the pooled ones."
        )


def _finish(job: Job, fused: Fused, before: dict[str, Measurement]) -> None:
    """Write bundle and summary; called by all processes together."""
    after = fused.after
    measured = {"target_accuracy": after.accuracy, "target_loss": after.loss} if after else {}
    metrics = {**fused.config.metrics, **measured}
    config = replace(fused.config, lineage=_lineage(job, fused), metrics=metrics)

    def write() -> None:
        saved = save_bundle(job.folder.path / BUNDLE, fused.model, config)
        job.folder.write_summary(
            "done",
            bundle=BUNDLE,
            identity=saved.identity,
            method=job.recipe.method,
            shares=[[parent.label, share] for parent, share in zip(job.everyone, fused.shares)],
            classes=job.labels.fates(),
            before={label: measurement.to_dict() for label, measurement in before.items()},
            merged=fused.merged.to_dict() if fused.merged else None,
            after=after.to_dict() if after else None,
            batchnorm_layers=len(batchnorm_layers(fused.model)),
            batchnorm_batches=fused.batches,
            processes=job.team.size,
            **fused.notes,
        )
        clear_work(job.work)

    job.team.on_main(write)


def _lineage(job: Job, fused: Fused) -> dict[str, Any]:
    shares = [*fused.shares, *[None] * (len(job.everyone) - len(fused.shares))]
    parents = [
        {**parent_record(parent.folder, parent.config), "share": share}
        for parent, share in zip(job.everyone, shares)
    ]
    used = [name for name in ("alpha", "scale", "density", "gamma", "seed") if name in job.method.uses]
    return {
        "stage": "fuse",
        "parents": parents,
        "method": job.recipe.method,
        **{name: getattr(job.settings, name) for name in used},
        "data": job.data.name if job.data else "none",
        "data_fingerprint": job.data.fingerprint if job.data else None,
        "batchnorm": f"re-estimated on {fused.batches} batches" if fused.batches else "as merged",
        "notes": fused.notes,
        "recipe": job.recipe.model_dump(mode="json"),
    }
