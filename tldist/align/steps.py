"""What an alignment does between its plan and its bundle: read both domains, fit maps, refit the head."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tldist.align.head import WEIGHTS_FILE, Head, Samples, refit, write_weights
from tldist.align.job import Job
from tldist.align.methods import Fit, all_finite
from tldist.align.read import Read, read_domain
from tldist.align.weights import WEIGHTS
from tldist.errors import DomainError, ModelError
from tldist.features.heads import LinearHead, Sweep
from tldist.progress import say, warn
from tldist.training.ledger import Ledger


def read_source(job: Job) -> Read:
    with_moments = not job.method.needs_samples(job.options)
    return _read(job, "source", job.domains.source_kept, with_moments)


def read_target(job: Job) -> Read:
    """The target's labels are not read here; its samples are kept for what needs more than moments."""
    by_samples = job.method.needs_samples(job.options)
    all_of_them = by_samples or job.recipe.weights != "none"
    keep = job.domains.target_kept if all_of_them else job.domains.told
    found = _read(job, "target", keep, not by_samples)
    _warn_if_few(job, found)
    return found


def _read(job: Job, name: str, keep: np.ndarray, with_moments: bool) -> Read:
    domain = job.domains.source if name == "source" else job.domains.target
    return read_domain(
        job.model,
        job.config.preprocessing,
        domain,
        job.team,
        Ledger(domain, job.folder.path / f"bad_{name}_images.jsonl"),
        keep=keep,
        with_moments=with_moments,
        classes=job.domains.classes if name == "source" else None,
        batch_size=job.recipe.batch_size,
        workers=job.workers,
        label=f"{name} features",
    )


def _warn_if_few(job: Job, target: Read) -> None:
    moments = target.moments
    if moments and job.method.uses_covariance and moments.count <= moments.width:
        warn(
            f"the target has {moments.count:,} images for {moments.width:,} dimensions: its covariance is "
            f"partly noise, and the regularisation (ridge={job.options.get('ridge')}) decides much"
        )


def _told_labels(job: Job, target: Read) -> Tensor:
    """The labels of the kept target samples, -1 for all whose labels are not to be used."""
    told = job.domains.told[target.kept.indices.numpy()]
    labels = np.full(len(told), -1, dtype=np.int64)
    if told.any():
        known = job.domains.target.labels_in(job.domains.classes)
        labels[told] = known[target.kept.indices.numpy()[told]]
    return torch.from_numpy(labels)


def fit_maps(job: Job, source: Read, target: Read) -> Fit:
    """Fit the maps, on one process: all get the same."""
    labels = {"source_labels": source.kept.labels, "target_labels": _told_labels(job, target)}
    given = {name: labels[name] for name in job.method.labels}
    say("fitting the maps")

    def fit() -> Fit:
        if job.method.needs_samples(job.options):
            return job.method(source.kept.features, target.kept.features, **given, **job.options)
        assert source.moments is not None
        assert target.moments is not None
        return job.method(source.moments, target.moments, **job.options)

    found = job.team.on_main(fit)
    if not all_finite(found):
        raise ModelError(f"method={job.recipe.method} gives maps with NaN or infinity ({job.options}).")
    return found


def refit_head(job: Job, source: Read, target: Read, fit: Fit) -> Sweep[Head]:
    """A new head on the labelled source in the common space."""
    held_out = torch.from_numpy(job.domains.held_out)[source.kept.indices]
    if not held_out.any() or held_out.all():
        raise DomainError(f"{job.domains.source.name}: too few images can be decoded to choose the head.")
    mapped = fit.map_source(source.kept.features.double())
    there = fit.map_target(target.kept.features.double()) if len(target.kept) else mapped[:0]
    if not torch.isfinite(mapped).all() or not torch.isfinite(there).all():
        raise ModelError(f"method={job.recipe.method} maps features to NaN or infinity ({job.options}).")
    weights = _weigh(job, source, mapped, there)
    labels = _told_labels(job, target)
    samples = Samples(mapped, source.kept.labels, held_out, weights)
    samples = samples.with_told(there[labels >= 0], labels[labels >= 0])
    say("fitting the head")
    sweep = job.team.on_main(lambda: refit(samples, len(job.domains.classes), job.recipe.head))
    if isinstance(sweep.head, LinearHead) and not sweep.head.converged:
        warn("the head's fit stopped before it converged; its penalty may be too weak for these features")
    return sweep


def _weigh(job: Job, source: Read, mapped: Tensor, target: Tensor) -> Tensor:
    """Weights of the source samples, written beside the run; ones where none are asked for."""
    if job.recipe.weights == "none":
        return torch.ones(len(mapped), dtype=torch.float64)
    say(f"weighing the source's samples by {job.recipe.weights}")
    path = job.folder.path / WEIGHTS_FILE

    def weigh() -> Tensor:
        weights = WEIGHTS[job.recipe.weights](mapped, target)
        write_weights(path, job.domains.source, source.kept.indices, weights)
        return weights

    weights = job.team.on_main(weigh)
    effective = float(weights.sum() ** 2 / weights.square().sum())
    if effective < 0.05 * len(weights):
        warn(f"the weights leave the head {effective:.0f} of {len(weights):,} source samples, in effect")
    return weights
