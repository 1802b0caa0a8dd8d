"""Class means as pairs, where two models share no samples but the names of their classes."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, as_labels
from tldist.features.heterogeneous.paired import PairedMoments


def class_means(features: Values, labels: Values) -> dict[int, Tensor]:
    """The mean of each class, float64 (D,), by class in rising order.

    Args:
        features: (N, D).
        labels: whole numbers (N,).
    """
    values = as_features(features)
    places = as_labels(labels, len(values)).to(values.device)
    return {int(c): values[places == c].mean(0) for c in places.unique().tolist()}


def pair_anchors(
    source: Values, source_labels: Values, target: Values, target_labels: Values, *, least: int = 2
) -> PairedMoments:
    """The moments of one pair a class: the mean of its source and of its target features.

    Reads the target's labels; a few images of each class are enough. Every class weighs the same.

    Args:
        source, target: (N, D) and (M, E).
        source_labels, target_labels: whole numbers (N,) and (M,), in one list of classes.
        least: classes that both must have.

    Raises:
        DomainError: fewer classes in common.
    """
    first, second = class_means(source, source_labels), class_means(target, target_labels)
    shared = [name for name in first if name in second]
    if len(shared) < least:
        raise DomainError(
            f"{len(shared)} classes have images in both domains, expected at least {least}: class means are "
            f"all that the two models' features are tied by."
        )
    return PairedMoments.from_batch(
        torch.stack([first[name] for name in shared]), torch.stack([second[name] for name in shared])
    )
