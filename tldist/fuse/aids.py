"""What some merges must know of data first: Fisher information, inner products, learned coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tldist.bundle import WEIGHTS
from tldist.domain import Domain
from tldist.errors import RecipeError
from tldist.files import atomic_file
from tldist.fuse.aligned import with_aligned
from tldist.fuse.in_weights import Merge, head_rows, merged_config
from tldist.fuse.job import Job
from tldist.fuse.statistics.adamerging import Learning, learn_coefficients
from tldist.fuse.statistics.fisher import fisher_information, normalised
from tldist.fuse.statistics.gram import gram_matrices
from tldist.fuse.weights.files import Weights, open_weights
from tldist.models.description import build_model
from tldist.models.heads import find_head
from tldist.models.weights import read_tensors
from tldist.progress import warn
from tldist.training.ledger import Ledger

_GRADIENTS = 256
"""Images that Fisher information is taken from where nobody says more: each costs a gradient a class."""


def with_aids(job: Job, merge: Merge) -> tuple[Merge, dict[str, Any]]:
    """A merge with what its method needs to know of data; called by all processes together.

    Returns:
        The merge, and what there is to say of it, as plain data.

    Raises:
        RecipeError: no data.
    """
    aid = merge.method.aid
    if aid is None:
        return merge, {}
    if aid == "alignment":
        return with_aligned(job, merge)
    if job.train is None and (aid == "coefficients" or not job.sources):
        raise RecipeError(f"method={job.recipe.method} needs data=, images of the target (or sources=).")
    if aid == "coefficients":
        return _with_coefficients(job, merge)
    compute = _fisher if aid == "fisher" else _grams
    files = tuple(_stored(job, f"{aid}-{number}", compute, number) for number in merge.members)
    domains = [_domain(job, number).name for number in merge.members]
    return replace(merge, aids=files), {"statistics_from": domains}


def _domain(job: Job, number: int) -> Domain:
    """Where a parent's statistics are taken: on the domain that it was trained on, else on the target."""
    domain = job.sources[number].training_split() if job.sources else job.train
    assert domain is not None
    return domain


def _stored(job: Job, name: str, compute: Callable[[Job, int], Mapping[str, Tensor]], number: int) -> Weights:
    """Statistics of one parent as a file, so that one model at a time is in memory; kept if interrupted."""
    file = job.work / name / WEIGHTS
    if not job.team.on_main(file.is_file):
        found = compute(job, number)
        job.team.on_main(lambda: _save(found, file))
    return open_weights(file)


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        save_file({name: tensor.float().contiguous() for name, tensor in tensors.items()}, temporary)


def _fisher(job: Job, number: int) -> dict[str, Tensor]:
    domain = _domain(job, number)
    model, config = job.load(job.parents[number])
    ledger = Ledger(domain, job.folder.path / "bad_statistics_images.jsonl")
    found = fisher_information(
        model, config.preprocessing, domain, job.team, ledger, walk=job.walk(_GRADIENTS), task=config.task
    )
    return normalised(found)


def _grams(job: Job, number: int) -> dict[str, Tensor]:
    domain = _domain(job, number)
    model, config = job.load(job.parents[number])
    ledger = Ledger(domain, job.folder.path / "bad_statistics_images.jsonl")
    return gram_matrices(model, config.preprocessing, domain, job.team, ledger, walk=job.walk()).matrices


def _with_coefficients(job: Job, merge: Merge) -> tuple[Merge, dict[str, Any]]:
    """AdaMerging's coefficients, learned on the target's images without their labels."""
    assert job.base is not None
    assert job.train is not None
    options, config = job.recipe.adamerging, merged_config(job)
    model = build_model(config.model, trust_code=job.recipe.trust_code).to(job.team.device).eval()
    head = find_head(model)[0]
    base, models = _aligned(job, merge, head)
    learned = learn_coefficients(
        model,
        base,
        models,
        config.preprocessing,
        job.train,
        job.team,
        Ledger(job.train, job.folder.path / "bad_images.jsonl"),
        learning=Learning(
            scale=merge.settings.scale,
            steps=options.steps,
            lr=options.lr,
            batch_size=max(options.batch_size, 2),
            by_tensor=options.layerwise,
            seed=job.recipe.seed,
            workers=job.workers,
        ),
        task=config.task,
        agreed=job.agreed,
    )
    if learned.collapsed:
        warn(
            f"AdaMerging: all answers became one; the coefficients of step {learned.kept} of {learned.steps} "
            f"are kept"
        )
    entropies = learned.entropies
    notes = {
        "coefficients": {name: list(values) for name, values in learned.coefficients.items()},
        "entropy": {"before": entropies[0], "after": entropies[-1], "steps": learned.steps},
    }
    return replace(merge, settings=replace(merge.settings, coefficients=learned.coefficients)), notes


def _aligned(job: Job, merge: Merge, head: str) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Tensors of the base and the parents, heads in the result's class order.

    Of a base that knows other classes, the head is the parents' mean, and theirs too: it has no task vector.

    Raises:
        RecipeError: the parents know different classes.
    """
    classes = merged_config(job).classes
    known = [job.labels.known[number] for number in merge.members]
    if any(set(names) != set(classes) for names in known):
        raise RecipeError("method=adamerging needs bundles that all know the result's classes.")
    assert job.base is not None
    models = [read_tensors(job.parents[number].folder / WEIGHTS) for number in merge.members]
    base = read_tensors(job.base.folder / WEIGHTS)
    for name in head_rows(job, head):
        for tensors, names in zip(models, known):
            tensors[name] = tensors[name][[names.index(label) for label in classes]]
        ancestor = job.base.config.classes
        if set(classes) <= set(ancestor):
            base[name] = base[name][[ancestor.index(label) for label in classes]]
        else:
            mean = torch.stack([tensors[name] for tensors in models]).mean(0)
            base[name] = mean
            for tensors in models:
                tensors[name] = mean
    return base, models
