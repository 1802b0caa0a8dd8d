"""An ensemble from models of any architectures: whose votes count for which class, and what goes in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tldist.bundle import BundleConfig
from tldist.domain import sort_names
from tldist.errors import BundleError, close_matches
from tldist.models.composite import Ensemble
from tldist.models.composite_layout import Combine, EnsembleLayout, Input, read_layout
from tldist.models.description import architecture_name
from tldist.progress import warn
from tldist.runtime.preprocess import Preprocessing

Parents = Sequence[tuple[nn.Module, BundleConfig]]
"""Models in evaluation mode with what they are."""


def build_ensemble(
    parents: Parents,
    combine: Combine = "probabilities",
    weights: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Ensemble, BundleConfig]:
    """One model that answers with the average of several.

    Args:
        parents: the members; the ensemble holds the very modules.
        combine: ``logits`` (the mean logit), ``probabilities`` (the log of the mean probability, each
            member's logits divided by its temperature) or ``stacking`` (the same, for shares that
            `tldist.fuse.stacking.fit_stacking` fits).
        weights: one number a member, not negative: its share in every class, among those that know it.
            None: all equal.
        classes: of the ensemble, in order; each known to a member. None: all that any member knows.

    Returns:
        The ensemble in evaluation mode, and its configuration without lineage and metrics.

    Raises:
        BundleError: the members answer different tasks, or nobody knows a class.
    """
    check_parents(parents)
    configs = [config for _, config in parents]
    names = _all_classes(configs) if classes is None else tuple(classes)
    _check_known(configs, names)
    how = common_preprocessing(configs)
    description = {
        "type": "ensemble",
        "task": configs[0].task,
        "combine": combine,
        "input": Input.of(how).model_dump(),
        "members": [_describe(config, names) for config in configs],
    }
    ensemble = Ensemble(read_layout(EnsembleLayout, description), [model for model, _ in parents])
    if weights is not None:
        ensemble.shares = member_shares(torch.tensor(weights, dtype=torch.float64), ensemble.known, names)
    shares = ensemble.shares.double().mean(1).tolist()
    pooled = sum(share * config.temperature for share, config in zip(shares, configs)) / sum(shares)
    # Softmax of the ensemble's own logits is the mean probability. Mean logits keep the members' scales: of
    # members that agree up to their temperatures, the mean logit has the mean temperature.
    temperature = pooled if combine == "logits" else 1.0
    config = BundleConfig(description, names, how, temperature=temperature, task=configs[0].task)
    return ensemble.eval(), config


def check_parents(parents: Parents) -> None:
    """Check that models can answer together.

    Raises:
        BundleError: one has no classes, or they differ in task.
    """
    for number, (_, config) in enumerate(parents, 1):
        if not config.classes:
            raise BundleError(f"{label_of(config, number)} has no classes; there is no answer to combine.")
        if config.task != parents[0][1].task:
            raise BundleError(
                f"{label_of(config, number)} is {config.task} and {label_of(parents[0][1], 1)} is "
                f"{parents[0][1].task}: one answers with one class an image, the other with any number."
            )


def label_of(config: BundleConfig, number: int) -> str:
    """What to call a parent in a message, counted from 1."""
    return f"model {number} ({architecture_name(config.model)})"


def common_preprocessing(configs: Sequence[BundleConfig]) -> Preprocessing:
    """The preprocessing of the first of those that take the most pixels: the others' are made from it.

    Says so where a member will see another part of the picture, or other proportions, than it was made for.
    """
    chosen = max((config.preprocessing for config in configs), key=lambda how: how.height * how.width)
    for number, config in enumerate(configs, 1):
        own = config.preprocessing
        if _field_of_view(own) != _field_of_view(chosen) or own.interpolation != chosen.interpolation:
            warn(
                f"{label_of(config, number)} was made for {_words(own)}; it will be given what "
                f"{_words(chosen)} shows, resized to {own.height}x{own.width}"
            )
    return chosen


def _field_of_view(how: Preprocessing) -> tuple[float, float]:
    """Height and width of the crop, as shares of the shorter side of the picture."""
    shorter = max(how.resize, how.height, how.width)
    return round(how.height / shorter, 2), round(how.width / shorter, 2)


def _words(how: Preprocessing) -> str:
    return f"{how.height}x{how.width} of a picture resized to {how.resize} ({how.interpolation})"


def member_shares(weights: torch.Tensor, known: torch.Tensor, classes: Sequence[str]) -> torch.Tensor:
    """The shares of members in each class, from weights: float32 (M, K), sum 1 over those that know it.

    Args:
        weights: float64 (M,), or (M, K); not negative.
        known: bool (M, K).
        classes: their names, for the message.

    Raises:
        BundleError: a class is known to members of weight 0 only, or the number of weights is another.
    """
    if len(weights) != len(known) or not bool((weights >= 0).all() and torch.isfinite(weights).all()):
        raise BundleError(f"weights: expected {len(known)} finite numbers that are not negative.")
    if weights.dim() == 1 and bool((weights == 0).any()):
        warn("weights: a model of weight 0 is computed for nothing; leave it out")
    raw = weights.reshape(len(weights), -1) * known.cpu()
    totals = raw.sum(0)
    if not bool((totals > 0).all()):
        name = classes[int((totals <= 0).nonzero()[0])]
        raise BundleError(f"weights: only members of weight 0 know the class '{name}'.")
    return (raw / totals).float().to(known.device)


def _all_classes(configs: Sequence[BundleConfig]) -> tuple[str, ...]:
    """The first parent's order where all know the same classes, else the union in natural order."""
    first = configs[0].classes
    if all(set(config.classes) == set(first) for config in configs):
        return first
    return sort_names(name for config in configs for name in config.classes)


def _describe(config: BundleConfig, classes: Sequence[str]) -> dict[str, object]:
    place = {name: row for row, name in enumerate(config.classes)}
    return {
        "model": config.model,
        "input": Input.of(config.preprocessing).model_dump(),
        "rows": [place.get(name, -1) for name in classes],
        "temperature": float(config.temperature),
    }


def _check_known(configs: Sequence[BundleConfig], classes: Sequence[str]) -> None:
    if len(set(classes)) != len(classes):
        raise BundleError("classes: a name occurs twice.")
    known = {name for config in configs for name in config.classes}
    for name in classes:
        if name not in known:
            raise BundleError(f"no model knows the class '{name}'. {close_matches(name, known)}")
