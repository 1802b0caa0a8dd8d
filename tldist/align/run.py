"""Align: load, extract, fit, refit the head, measure, save."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tldist import distributed
from tldist.align.assemble import assemble, check_assembled
from tldist.align.domains import Domains, choose_domains
from tldist.align.methods import METHODS, Fit, Method
from tldist.align.recipe import AlignRecipe
from tldist.bundle import BundleConfig, find_bundle, parent_record
from tldist.data.loader import num_workers
from tldist.distributed import Team
from tldist.domain import open_domain
from tldist.errors import DomainError, ModelError
from tldist.features.extract import Features, extract, feature_batches
from tldist.features.heads import Sweep, sweep_logistic
from tldist.features.moments import Moments, gather_moments, merge_moments
from tldist.methods import find_method
from tldist.models.chain import Chain
from tldist.models.description import architecture_name
from tldist.models.heads import find_head
from tldist.models.load import load_bundle, save_bundle
from tldist.progress import say, show_plan, warn
from tldist.runs import BUNDLE, Outcome, RunFolder, open_run, recorded
from tldist.training.ledger import Ledger
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
    def ridge(self) -> float:
        """The strength of the regularisation."""
        return self.method.ridge if self.recipe.ridge is None else self.recipe.ridge


def run(recipe: AlignRecipe) -> Outcome:
    """Align the features of two domains and refit the head; the same call again says that it is done.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    method = find_method(recipe.method, METHODS, Method)
    team = distributed.start()
    model, config = load_bundle(recipe.bundle, trust_code=recipe.trust_code)
    find_head(model)  # an ensemble has none to refit: it says so now, not after its features
    source, target = open_domain(recipe.source), open_domain(recipe.target)
    inputs = {"model": config.identity, "source": source.fingerprint, "target": target.fingerprint}
    team.agree(recipe, inputs)
    folder = team.on_main(lambda: open_run("align", recipe.out, recipe, inputs))
    if folder.finished:
        return _outcome(folder, f"{folder.path} is finished already.")
    with recorded(folder, team.is_main):
        domains = choose_domains(source, target, recipe.validation, recipe.seed)
        workers = num_workers(recipe.workers, team.local_size)
        job = Job(recipe, method, team, folder, model.to(team.device), config, domains, workers)
        _show(job)
        before = _measure(job, job.model, config.classes, "before")
        features = _extract_source(job)
        fit = _fit(job, features)
        sweep = _refit_head(job, features, fit)
        chain, description = _assemble(job, fit, sweep)
        after = _measure(job, chain, job.domains.classes, "after")
        return _finish(job, chain, description, sweep, before, after)


def _show(job: Job) -> None:
    recipe, domains, how = job.recipe, job.domains, job.config.preprocessing
    show_plan(
        "align",
        {
            "model": f"{architecture_name(job.config.model)}, input {how.height}x{how.width}",
            "method": f"{recipe.method}, ridge {job.ridge}",
            "source": f"{domains.source.name}: {len(domains.source):,} images of {len(domains.classes)} "
            f"classes, {int(domains.held_out.sum()):,} of them choose the head's penalty",
            "target": f"{domains.target.name}: {len(domains.target):,} images, without their labels",
            "report": f"accuracy on {len(domains.test):,} images of {domains.test.name}"
            if domains.test.has_labels
            else "no accuracy: the target has no labels",
            "processes": f"{job.team.size} on {job.team.device.type}, {job.workers} decoding workers each",
            "out": recipe.out,
        },
    )


def _measure(job: Job, model: nn.Module, classes: tuple[str, ...], when: str) -> Measurement | None:
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


def _extract_source(job: Job) -> Features:
    ledger = Ledger(job.domains.source, job.folder.path / "bad_source_images.jsonl")
    return extract(
        job.model,
        job.config.preprocessing,
        job.domains.source,
        job.team,
        batch_size=job.recipe.batch_size,
        workers=job.workers,
        classes=job.domains.classes,
        ledger=ledger,
        label="source features",
    )


def _fit(job: Job, source: Features) -> Fit:
    """Fit the maps on the moments of both domains; the target's features are never kept."""
    ledger = Ledger(job.domains.target, job.folder.path / "bad_target_images.jsonl")
    batches = feature_batches(
        job.model,
        job.config.preprocessing,
        job.domains.target,
        job.team,
        ledger,
        batch_size=job.recipe.batch_size,
        workers=job.workers,
        label="target features",
    )
    mine = merge_moments(Moments.from_batch(batch.features) for batch in batches if len(batch))
    ledger.settle(job.team)
    target = gather_moments(mine, job.team)
    if target is None or target.count < 2:
        raise DomainError(
            f"{job.domains.target.name}: fewer than 2 images can be decoded; an alignment needs many."
        )
    if job.method.uses_covariance and target.count <= target.width:
        warn(
            f"the target has {target.count:,} images for {target.width:,} dimensions: its covariance is "
            f"partly noise, and ridge={job.ridge} decides much"
        )
    moments = Moments.from_batch(source.features)
    return job.team.on_main(lambda: job.method.fit(moments, target, job.ridge))


def _refit_head(job: Job, source: Features, fit: Fit) -> Sweep:
    """A new head on the labelled source in the common space."""
    mapped = source.features.double()
    if fit.source is not None:
        mapped = fit.source(mapped)
    if not torch.isfinite(mapped).all():
        raise ModelError(f"method={job.recipe.method} maps features to NaN or infinity (ridge={job.ridge}).")
    held_out = torch.from_numpy(job.domains.held_out)[source.indices]
    if not held_out.any() or held_out.all():
        raise DomainError(
            f"{job.domains.source.name}: too few images can be decoded to choose the head's penalty."
        )
    say("fitting the head")
    sweep = job.team.on_main(
        lambda: sweep_logistic(mapped, source.labels, len(job.domains.classes), held_out)
    )
    if not sweep.head.converged:
        warn("the head's fit stopped before it converged; its penalty may be too weak for these features")
    return sweep


def _assemble(job: Job, fit: Fit, sweep: Sweep) -> tuple[Chain, dict[str, Any]]:
    how = job.config.preprocessing
    chain, description = assemble(
        job.model, job.config.model, fit.target, sweep.head, trust_code=job.recipe.trust_code
    )
    chain.to(job.team.device)
    noise = np.random.default_rng(0).integers(0, 256, (2, how.height, how.width, 3), dtype=np.uint8)
    images = torch.from_numpy(noise).to(job.team.device)
    check_assembled(chain, int(fit.target is not None), job.model, how, images)
    return chain, description


def _finish(
    job: Job,
    chain: Chain,
    description: dict[str, Any],
    sweep: Sweep,
    before: Measurement | None,
    after: Measurement | None,
) -> Outcome:
    """Write bundle and summary."""
    metrics = {"source_held_out_accuracy": sweep.held_out_accuracy}
    if after:
        metrics |= {"target_accuracy": after.accuracy, "target_loss": after.loss}
    config = BundleConfig(
        description, job.domains.classes, job.config.preprocessing, _lineage(job, sweep), metrics
    )

    def write() -> None:
        saved = save_bundle(job.folder.path / BUNDLE, chain, config)
        job.folder.write_summary(
            "done",
            bundle=BUNDLE,
            identity=saved.identity,
            method=job.recipe.method,
            before=before.to_dict() if before else None,
            after=after.to_dict() if after else None,
            source_held_out_accuracy=sweep.held_out_accuracy,
            l2=sweep.head.l2,
            l2_tried=[list(pair) for pair in sweep.tried],
            processes=job.team.size,
        )

    job.team.on_main(write)
    return _outcome(job.folder, "")


def _lineage(job: Job, sweep: Sweep) -> dict[str, Any]:
    return {
        "stage": "align",
        "parents": [parent_record(find_bundle(job.recipe.bundle), job.config)],
        "method": job.recipe.method,
        "ridge": job.ridge,
        "l2": sweep.head.l2,
        "data": f"{job.domains.source.name} -> {job.domains.target.name}",
        "source_fingerprint": job.domains.source.fingerprint,
        "target_fingerprint": job.domains.target.fingerprint,
        "target_labels": "not used",
        "recipe": job.recipe.model_dump(mode="json"),
    }


def _outcome(folder: RunFolder, note: str) -> Outcome:
    summary = folder.summary
    before, after = summary.get("before"), summary.get("after")
    lines = [note] if note else []
    lines.append(f"source accuracy (held out, in the common space) {summary['source_held_out_accuracy']:.4f}")
    if after:
        lines.append(
            f"target accuracy {_words(before)} before, {_words(after)} after ({after['count']:,} images)"
        )
    bundle: Path = folder.path / BUNDLE
    values = {
        "bundle": str(bundle),
        "method": summary["method"],
        "before": before["accuracy"] if before else None,
        "accuracy": after["accuracy"] if after else None,
        "source_held_out_accuracy": summary["source_held_out_accuracy"],
    }
    following = f"tldist export {bundle} profile=cpu-fp32 out={folder.path}/package"
    return Outcome("align", folder.path, values, "\n".join(lines), following)


def _words(measurement: dict[str, Any] | None) -> str:
    return f"{measurement['accuracy']:.4f}" if measurement else "(not measured)"
