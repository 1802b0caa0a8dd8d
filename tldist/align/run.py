"""Align: load, read both domains, fit, refit the head, measure, save."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tldist import distributed
from tldist.align.assemble import assemble, check_assembled
from tldist.align.domains import choose_domains
from tldist.align.head import Head
from tldist.align.job import Job, measure_target, show
from tldist.align.methods import METHODS, Fit, Method
from tldist.align.recipe import AlignRecipe
from tldist.align.steps import fit_maps, read_source, read_target, refit_head
from tldist.bundle import BundleConfig, find_bundle, parent_record
from tldist.data.loader import num_workers
from tldist.domain import open_domain
from tldist.features.heads import LinearHead, Sweep
from tldist.methods import find_method
from tldist.models.chain import Chain
from tldist.models.heads import find_head
from tldist.models.load import load_bundle, save_bundle
from tldist.runs import BUNDLE, Outcome, RunFolder, open_run, recorded
from tldist.training.measure import Measurement


def run(recipe: AlignRecipe) -> Outcome:
    """Align the features of two domains and refit the head; the same call again says that it is done.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    method = find_method(recipe.method, METHODS, _as_method)
    method.check_options(recipe.method, recipe.options)
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
        domains = choose_domains(
            source,
            target,
            held_out=recipe.validation,
            samples=recipe.samples,
            target_labels=recipe.target_labels,
            seed=recipe.seed,
        )
        workers = num_workers(recipe.workers, team.local_size)
        job = Job(recipe, method, team, folder, model.to(team.device), config, domains, workers)
        show(job)
        before = measure_target(job, job.model, config.classes, "before")
        first, second = read_source(job), read_target(job)
        fit = fit_maps(job, first, second)
        sweep = refit_head(job, first, second, fit)
        chain, description = _assemble(job, fit, sweep)
        after = measure_target(job, chain, job.domains.classes, "after")
        return _finish(job, chain, description, fit, sweep, before, after)


def _as_method(found: Any) -> Method:
    return found if isinstance(found, Method) else Method(found)


def _assemble(job: Job, fit: Fit, sweep: Sweep[Head]) -> tuple[Chain, dict[str, Any]]:
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
    fit: Fit,
    sweep: Sweep[Head],
    before: Measurement | None,
    after: Measurement | None,
) -> Outcome:
    """Write bundle and summary."""
    metrics = {"source_held_out_accuracy": sweep.held_out_accuracy}
    if after:
        metrics |= {"target_accuracy": after.accuracy, "target_loss": after.loss}
    config = BundleConfig(
        description, job.domains.classes, job.config.preprocessing, _lineage(job, fit, sweep), metrics
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
            fit=dict(fit.notes),
            head=job.recipe.head,
            tried=[list(pair) for pair in sweep.tried],
            **_penalty(sweep),
            processes=job.team.size,
        )

    job.team.on_main(write)
    return _outcome(job.folder, "")


def _lineage(job: Job, fit: Fit, sweep: Sweep[Head]) -> dict[str, Any]:
    told = int(job.domains.told.sum())
    return {
        "stage": "align",
        "parents": [parent_record(find_bundle(job.recipe.bundle), job.config)],
        "method": job.recipe.method,
        "options": job.options,
        "fit": dict(fit.notes),
        "head": job.recipe.head,
        **_penalty(sweep),
        "data": f"{job.domains.source.name} -> {job.domains.target.name}",
        "source_fingerprint": job.domains.source.fingerprint,
        "target_fingerprint": job.domains.target.fingerprint,
        "target_labels": f"{told} of {len(job.domains.target)} used" if told else "not used",
        "recipe": job.recipe.model_dump(mode="json"),
    }


def _penalty(sweep: Sweep[Head]) -> dict[str, float]:
    head = sweep.head
    return {"l2": head.l2} if isinstance(head, LinearHead) and head.l2 else {}


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
