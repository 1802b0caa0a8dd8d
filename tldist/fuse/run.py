"""Fuse: read, check, merge, re-estimate, measure, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tldist import distributed
from tldist.bundle import BundleConfig, parent_record
from tldist.data.loader import num_workers
from tldist.distributed import Team
from tldist.domain import Domain, open_domain
from tldist.errors import RecipeError
from tldist.files import canonical_json, sha256_text
from tldist.fuse.batchnorm import batchnorm_layers, reestimate
from tldist.fuse.finite import check_finite, probe_images
from tldist.fuse.merge import merge_models
from tldist.fuse.methods import METHODS, Method, Settings, model_shares
from tldist.fuse.parents import Parent, agreed_statistics, check_fit, read_parents
from tldist.fuse.recipe import FuseRecipe
from tldist.fuse.verdict import outcome_of
from tldist.methods import find_method
from tldist.models.description import architecture_name
from tldist.models.load import load_bundle, save_bundle
from tldist.progress import say, show_plan, warn
from tldist.runs import BUNDLE, Outcome, RunFolder, open_run, recorded
from tldist.training.ledger import LEDGER, Ledger
from tldist.training.measure import Measurement, measure, predictor, why_not_measurable


@dataclass(frozen=True)
class Job:
    """What a fusion works with.

    Attributes:
        base: the common ancestor, where the method uses it.
        data: the target domain; None where none was given.
        test: the part of it that parents and result are measured on; None: they are not.
    """

    recipe: FuseRecipe
    method: Method
    settings: Settings
    team: Team
    folder: RunFolder
    parents: list[Parent]
    base: Parent | None
    data: Domain | None
    test: Domain | None
    workers: int

    @property
    def config(self) -> BundleConfig:
        """Architecture, classes and preprocessing of the result: the first parent's."""
        return self.parents[0].config

    @property
    def everyone(self) -> list[Parent]:
        """The models that have a share in the result, the base first."""
        return [self.base, *self.parents] if self.base else self.parents

    @property
    def shares(self) -> tuple[float, ...]:
        """Of ``everyone``, sum 1."""
        return model_shares(self.method, self.settings, self.base is not None)


def run(recipe: FuseRecipe) -> Outcome:
    """Merge bundles; the same call again says that it is done.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    method = find_method(recipe.method, METHODS, Method)
    _check_recipe(recipe, method)
    team = distributed.start()
    parents = read_parents(recipe.bundles)
    base = read_parents([recipe.base])[0] if recipe.base and "base" in method.uses else None
    check_fit([*parents, base] if base else parents)
    data = open_domain(recipe.data) if recipe.data else None
    inputs = _identities(parents, base, data)
    team.agree(recipe, inputs)
    folder = team.on_main(lambda: open_run("fuse", recipe.out, recipe, inputs))
    if folder.finished:
        return outcome_of(folder, f"{folder.path} is finished already.")
    with recorded(folder, team.is_main):
        job = _prepare(recipe, method, team, folder, parents, base, data)
        _show(job)
        model = merge_models(parents, base, method, job.settings, trust_code=recipe.trust_code)
        model.to(team.device)
        probes = probe_images(job.config.preprocessing, data).to(team.device)
        check_finite(model, job.config.preprocessing, probes)
        before = _measure_parents(job)
        merged = _measure(job, model, job.config, "merged")
        batches = _reestimate(job, model)
        if batches:
            check_finite(model, job.config.preprocessing, probes)
        after = _measure(job, model, job.config, "result") if batches else merged
        _compare(merged, after)
        return _finish(job, model, batches, before, merged, after)


def _check_recipe(recipe: FuseRecipe, method: Method) -> None:
    """Refuse what is missing, say what is ignored."""
    if method.needs_base and recipe.base is None:
        raise RecipeError(
            f"method={recipe.method} needs base=BUNDLE, the model that the others were fine-tuned from."
        )
    given = {
        "base": recipe.base is not None,
        "weights": recipe.weights is not None,
        "alpha": recipe.alpha != FuseRecipe.model_fields["alpha"].default,
    }
    for name, is_given in given.items():
        if is_given and name not in method.uses:
            warn(f"{name}= is not used by method={recipe.method}")


def _identities(parents: Sequence[Parent], base: Parent | None, data: Domain | None) -> dict[str, str]:
    return {
        "models": sha256_text(canonical_json([parent.config.identity for parent in parents])),
        "base": base.config.identity if base else "none",
        "data": data.fingerprint if data else "none",
    }


def _prepare(
    recipe: FuseRecipe,
    method: Method,
    team: Team,
    folder: RunFolder,
    parents: list[Parent],
    base: Parent | None,
    data: Domain | None,
) -> Job:
    weights = recipe.weights or (1.0,) * len(parents)
    settings = Settings(tuple(weight / sum(weights) for weight in weights), recipe.alpha)
    test = data.evaluation_split() if data else None
    reason = why_not_measurable(test, parents[0].config.classes, parents[0].config.task) if test else None
    if test and reason:
        warn(f"nothing is measured on {test.name}: {reason}")
        test = None
    workers = num_workers(recipe.workers, team.local_size)
    return Job(recipe, method, settings, team, folder, parents, base, data, test, workers)


def _show(job: Job) -> None:
    rows: dict[str, Any] = {
        "method": job.recipe.method,
        "models": f"{len(job.everyone)} of {architecture_name(job.config.model)}, "
        f"{len(job.config.classes)} classes",
    }
    for number, (parent, share) in enumerate(zip(job.everyone, job.shares), 1):
        role = "base" if parent is job.base else f"model {number - (job.base is not None)}"
        rows[role] = f"{share:.4f} of {parent.label}"
    show_plan(
        "fuse",
        {
            **rows,
            "data": f"{job.data.name}: {len(job.data):,} images" if job.data else "none",
            "measured on": f"{job.test.name}: {len(job.test):,} images" if job.test else "nothing",
            "processes": f"{job.team.size} on {job.team.device.type}, {job.workers} decoding workers each",
            "out": job.recipe.out,
        },
    )


def _measure_parents(job: Job) -> dict[str, Measurement]:
    """Every parent on the target, one at a time in memory."""
    found: dict[str, Measurement] = {}
    for parent in job.everyone if job.test else []:
        if parent.label in found:
            continue
        model, config = load_bundle(parent.folder, trust_code=job.recipe.trust_code)
        measured = _measure(job, model.to(job.team.device), config, parent.label)
        assert measured is not None
        found[parent.label] = measured
    return found


def _measure(job: Job, model: nn.Module, config: BundleConfig, label: str) -> Measurement | None:
    if job.test is None:
        return None
    return measure(
        predictor(model, config.preprocessing),
        job.test,
        config.classes,
        config.preprocessing,
        job.team,
        batch_size=job.recipe.batch_size,
        workers=job.workers,
        ledger_file=job.folder.path / "bad_test_images.jsonl",
        label=label,
    )


def _reestimate(job: Job, model: nn.Module) -> int:
    """Fit BatchNorm statistics to the merged weights; how many batches did it (0: none)."""
    recipe, layers = job.recipe, batchnorm_layers(model)
    agreed = agreed_statistics(job.everyone)
    if layers and len(agreed) == len(layers):
        say(f"the statistics of all {len(layers)} BatchNorm layers are the same in all models: they are kept")
        return 0
    if not layers:
        if job.data and not job.test:
            warn("data= is not used: the models have no BatchNorm, and nothing can be measured on it")
        return 0
    if job.data is None or recipe.recalibrate_batches == 0:
        cause = "no data= was given" if job.data is None else "recalibrate_batches=0"
        warn(
            f"{cause}: the statistics of {len(layers)} BatchNorm layers are pooled from the models', not "
            f"re-estimated for the merged weights; accuracy usually suffers. Give data= images of the target."
        )
        return 0
    train = job.data.training_split()
    return reestimate(
        model,
        job.config.preprocessing,
        train,
        job.team,
        Ledger(train, job.folder.path / LEDGER),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        workers=job.workers,
        most_batches=recipe.recalibrate_batches,
        agreed=agreed,
    )


def _compare(merged: Measurement | None, after: Measurement | None) -> None:
    """Say it where re-estimation has done harm, as a small sample can; labels do not choose in silence."""
    if merged and after and after.accuracy < merged.accuracy:
        warn(
            f"with re-estimated statistics the accuracy is {after.accuracy:.4f}, with pooled ones it was "
            f"{merged.accuracy:.4f}. More images may help; recalibrate_batches=0 keeps the pooled ones."
        )


def _finish(
    job: Job,
    model: nn.Module,
    batches: int,
    before: dict[str, Measurement],
    merged: Measurement | None,
    after: Measurement | None,
) -> Outcome:
    """Write bundle and summary."""
    metrics = {"target_accuracy": after.accuracy, "target_loss": after.loss} if after else {}
    how = job.config.preprocessing
    config = BundleConfig(
        job.config.model, job.config.classes, how, _lineage(job, batches), metrics, task=job.config.task
    )

    def write() -> None:
        saved = save_bundle(job.folder.path / BUNDLE, model, config)
        job.folder.write_summary(
            "done",
            bundle=BUNDLE,
            identity=saved.identity,
            method=job.recipe.method,
            shares=[[parent.label, share] for parent, share in zip(job.everyone, job.shares)],
            before={label: measurement.to_dict() for label, measurement in before.items()},
            merged=merged.to_dict() if merged else None,
            after=after.to_dict() if after else None,
            batchnorm_layers=len(batchnorm_layers(model)),
            batchnorm_batches=batches,
            processes=job.team.size,
        )

    job.team.on_main(write)
    return outcome_of(job.folder, "")


def _lineage(job: Job, batches: int) -> dict[str, Any]:
    parents = [
        {**parent_record(parent.folder, parent.config), "share": share}
        for parent, share in zip(job.everyone, job.shares)
    ]
    return {
        "stage": "fuse",
        "parents": parents,
        "method": job.recipe.method,
        "alpha": job.recipe.alpha if "alpha" in job.method.uses else None,
        "data": job.data.name if job.data else "none",
        "data_fingerprint": job.data.fingerprint if job.data else None,
        "batchnorm": f"re-estimated on {batches} batches" if batches else "pooled from the parents",
        "recipe": job.recipe.model_dump(mode="json"),
    }
