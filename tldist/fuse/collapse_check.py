"""The look at a result that only data allows: does it still tell images apart as its parents do."""

from __future__ import annotations

from torch import nn

from tldist.bundle import BundleConfig
from tldist.errors import ModelError
from tldist.fuse.job import Job
from tldist.fuse.statistics.collapse import Look, check_features, look_at
from tldist.fuse.statistics.walk import Walk
from tldist.training.ledger import Ledger

_IMAGES = 256


def check_collapse(job: Job, model: nn.Module, config: BundleConfig) -> None:
    """Refuse a merged model that gives all images one answer, or whose features hardly differ between them.

    Without ``data=`` there is nothing to see. Called by all processes together.

    Raises:
        ModelError: it has collapsed, and its parents have not.
    """
    if job.train is None or not config.classes:
        return
    reason = check_features(
        _look(job, model, config), [_look(job, *job.load(parent)) for parent in job.parents]
    )
    if reason:
        raise ModelError(
            f"the merged model is refused: {reason}. The models are too far apart for method="
            f"{job.recipe.method}: try base=, method=rebasin, ensemble or distill. Nothing was written."
        )


def _look(job: Job, model: nn.Module, config: BundleConfig) -> Look:
    assert job.train is not None
    walk = Walk(_IMAGES, job.recipe.batch_size, job.recipe.seed, job.workers)
    return look_at(
        model, config.preprocessing, job.train, job.team, Ledger(job.train, None), walk=walk, task=config.task
    )
