"""A new head for a merged backbone: multinomial logistic regression on the target's labelled images."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tldist.bundle import BundleConfig
from tldist.data.order import epoch_order
from tldist.errors import RecipeError
from tldist.features.extract import extract
from tldist.features.heads import Sweep, sweep_logistic
from tldist.fuse.job import Job
from tldist.models.description import with_outputs
from tldist.models.heads import Head, find_head, head_width, replace_module
from tldist.training.ledger import LEDGER, Ledger

_HELD_OUT = 5
"""One image in so many chooses the head's penalty."""


def rebuild_head(
    job: Job, model: nn.Module, config: BundleConfig
) -> tuple[nn.Module, BundleConfig, dict[str, Any]]:
    """Fit a head for the plan's classes on the features of labelled data=; the old head goes.

    Args:
        job: the fusion.
        model: merged, its statistics fitted.
        config: of the model.

    Raises:
        RecipeError: the train split has no labels.
    """
    train, classes = job.train, job.labels.classes
    if train is None or not train.has_labels:
        raise RecipeError("heads=rebuild needs labelled data=.")
    features = extract(
        model,
        config.preprocessing,
        train,
        job.team,
        batch_size=job.recipe.batch_size,
        workers=job.workers,
        classes=classes,
        ledger=Ledger(train, job.folder.path / LEDGER),
    )
    held_out = held_out_share(len(features), job.recipe.seed)
    sweep = job.team.on_main(
        lambda: sweep_logistic(features.features, features.labels, len(classes), held_out)
    )
    path, old = find_head(model)
    replace_module(model, path, _as_module(sweep, old).to(job.team.device))
    described = with_outputs(config.model, len(classes))
    notes = {"head": {"l2": sweep.head.l2, "held_out_accuracy": sweep.held_out_accuracy}}
    return model.eval(), replace(config, model=described, classes=classes), notes


def held_out_share(size: int, seed: int) -> Tensor:
    """bool (size,): which samples choose the penalty; a fifth of them, at least one."""
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.from_numpy(epoch_order(seed, 0, size))[: max(1, size // _HELD_OUT)]] = True
    return chosen


def _as_module(sweep: Sweep, old: Head) -> Head:
    outputs, width = sweep.head.weight.shape[0], head_width(old)
    if isinstance(old, nn.Linear):
        new: Head = nn.Linear(width, outputs)
        new.weight.data = sweep.head.weight.float()
    else:  # 1x1, before the mean over space: the same function of the mean features
        new = nn.Conv2d(width, outputs, 1)
        new.weight.data = sweep.head.weight.float().reshape(outputs, width, 1, 1)
    assert new.bias is not None
    new.bias.data = sweep.head.bias.float()
    return new
