"""What passes through merged layers, set right: BatchNorm statistics pooled or re-estimated, or REPAIR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from tldist.bundle import BundleConfig
from tldist.errors import RecipeError
from tldist.fuse.job import Job
from tldist.fuse.statistics.repair import channel_statistics, check_repairable, mean_statistics, repair
from tldist.progress import say, warn
from tldist.training.batchnorm import batchnorm_layers, reestimate
from tldist.training.ledger import LEDGER, Ledger


def fit_statistics(
    job: Job,
    model: nn.Module,
    config: BundleConfig,
    shares: Sequence[float],
    most_batches: int | None = None,
) -> tuple[int, dict[str, Any]]:
    """Fit what passes through the layers of a merged model, as the recipe says; what is not done is said.

    Args:
        job: the fusion.
        model: merged, changed in place.
        config: of the model.
        shares: of the job's models in it, the base first.
        most_batches: fewer batches than the recipe allows.

    Returns:
        How many batches did it (0: none), and what else there is to say, as plain data.

    Raises:
        RecipeError: data= is missing where the recipe asks for it.
    """
    how = job.recipe.statistics
    if how in ("reestimate", "repair") and job.train is None:
        raise RecipeError(f"statistics={how} needs data=, images of the target.")
    layers = batchnorm_layers(model)
    if how == "repair":
        return 0, {"repair": _repair(job, model, config, shares)}
    if not layers:
        if job.data and not job.test:
            warn("data= is not used: the models have no BatchNorm, and nothing can be measured on it")
        return 0, {}
    if len(job.agreed) == len(layers):
        say(f"the statistics of all {len(layers)} BatchNorm layers are the same in all models: they are kept")
        return 0, {}
    if job.train is None or how == "pooled" or job.recipe.recalibrate_batches == 0:
        _say_pooled(job, len(layers))
        return 0, {}
    limits = [n for n in (job.recipe.recalibrate_batches, most_batches) if n is not None]
    batches = reestimate(
        model,
        config.preprocessing,
        job.train,
        job.team,
        Ledger(job.train, job.folder.path / LEDGER),
        batch_size=job.recipe.batch_size,
        seed=job.recipe.seed,
        load=job.batches(job.train, config.preprocessing),
        most_batches=min(limits, default=None),
        agreed=job.agreed,
    )
    return batches, {}


def _repair(job: Job, model: nn.Module, config: BundleConfig, shares: Sequence[float]) -> dict[str, Any]:
    """REPAIR towards the parents that have a share; called by all processes together."""
    assert job.train is not None
    check_repairable(model)
    train, walk = job.train, job.walk()

    def ledger() -> Ledger:
        return Ledger(train, job.folder.path / LEDGER)

    taking = [(parent, share) for parent, share in zip(job.everyone, shares) if share]
    found = [
        channel_statistics(job.load(parent)[0], config.preprocessing, train, job.team, ledger(), walk=walk)
        for parent, _ in taking
    ]
    goals = mean_statistics(found, [share for _, share in taking])
    repaired = repair(model, goals, config.preprocessing, train, job.team, ledger(), walk=walk)
    return {"layers": len(repaired.layers), "left_out": repaired.left_out}


def _say_pooled(job: Job, layers: int) -> None:
    if job.recipe.statistics == "pooled":
        return
    cause = "no data= was given" if job.data is None else "recalibrate_batches=0"
    warn(
        f"{cause}: the statistics of {layers} BatchNorm layers are pooled from the models', not re-estimated "
        f"for the merged weights; accuracy usually suffers. Give data= images of the target."
    )
