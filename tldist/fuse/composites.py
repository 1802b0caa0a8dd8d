"""Fusions of models of any architectures that stay side by side: their outputs, or their features."""

from __future__ import annotations

from typing import Any

from torch import nn

from tldist.bundle import BundleConfig
from tldist.errors import RecipeError
from tldist.fuse.concat import build_concat
from tldist.fuse.concat_head import Join
from tldist.fuse.finite import check_finite, probe_images
from tldist.fuse.job import Fused, Job
from tldist.fuse.outputs import Parents, build_ensemble
from tldist.fuse.stacking import fit_stacking
from tldist.progress import warn
from tldist.training.ledger import Ledger


def fuse_outputs(job: Job) -> Fused:
    """An ensemble: the average of the members' logits or probabilities, or one with fitted shares.

    Raises:
        RecipeError: stacking without labelled data, or with weights.
    """
    combine = job.recipe.ensemble.combine
    if combine == "stacking" and job.recipe.weights is not None:
        raise RecipeError("weights= and ensemble.combine=stacking: the one gives the shares, the other fits.")
    ensemble, config = build_ensemble(_load(job), combine, job.recipe.weights, job.labels.classes)
    ensemble.to(job.team.device)
    notes: dict[str, Any] = {}
    if combine == "stacking":
        split = job.unmeasured
        if split is None:
            raise RecipeError("ensemble.combine=stacking fits shares on labelled data=, and none was given.")
        if job.test is not None and split.fingerprint == job.test.fingerprint:
            warn(f"the shares are fitted on the images that they are measured on ({split.name})")
        fitted = fit_stacking(
            ensemble,
            config,
            split,
            job.team,
            each=job.recipe.ensemble.shares,
            prior=job.recipe.ensemble.prior,
            batch_size=job.recipe.batch_size,
            workers=job.workers,
            ledger=Ledger(split, job.folder.path / "bad_stacking_images.jsonl"),
        )
        notes["stacking"] = fitted.to_dict()
    return _finish(job, ensemble, config, notes)


def fuse_features(job: Job) -> Fused:
    """The members' features side by side, and one new head on the target's labelled images.

    Raises:
        RecipeError: no labelled data.
    """
    if job.data is None or job.train is None:
        raise RecipeError("method=concat fits a head on labelled data=, and none was given.")
    options = job.recipe.concat
    join = Join(
        projection=options.projection,
        ridge=options.ridge,
        held_out=options.validation,
        seed=job.recipe.seed,
        batch_size=job.recipe.batch_size,
        workers=job.workers,
    )
    ledger = Ledger(job.train, job.folder.path / "bad_images.jsonl")
    model, config, joined = build_concat(_load(job), job.data, job.team, join, ledger=ledger)
    return _finish(job, model.to(job.team.device), config, {"head": joined.to_dict()})


def _load(job: Job) -> Parents:
    return [job.load(parent) for parent in job.parents]


def _finish(job: Job, model: nn.Module, config: BundleConfig, notes: dict[str, Any]) -> Fused:
    """Look at the result, and measure it."""
    probes = probe_images(config.preprocessing, job.data).to(job.team.device)
    check_finite(model, config.preprocessing, probes)
    after = job.measure(model, config, job.test, "result") if job.test else None
    return Fused(model.eval(), config, notes=notes, merged=after, after=after)
