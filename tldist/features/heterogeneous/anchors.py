"""Class means as anchors, where two models share no samples but the names of their classes."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, as_labels
from tldist.features.cross_moments import CrossMoments


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
    source: Values, source_labels: Values, target: Values, target_labels: Values
) -> CrossMoments:
    """The moments of pairs of a labelled target sample and the mean of its class in the source.

    Reads the target's labels; a few images of each class are enough. A ridge regression on them
    (`tldist.features.heterogeneous.ridge`) takes target features to their class's place in the source's
    space, and away from what varies within classes. Samples of classes that the source lacks are left out.

    Args:
        source, target: (N, D) and (M, E).
        source_labels, target_labels: whole numbers (N,) and (M,), in one list of classes.

    Raises:
        DomainError: fewer than two classes in common.
    """
    means = class_means(source, source_labels)
    values = as_features(target, "the target's features")
    places = as_labels(target_labels, len(values), "the target's labels").tolist()
    rows = [row for row, place in enumerate(places) if place in means]
    shared = {places[row] for row in rows}
    if len(shared) < 2:
        raise DomainError(
            f"{len(shared)} classes have images in both domains, expected at least 2: class means are all "
            f"that the two models' features are tied by."
        )
    return CrossMoments.from_batch(torch.stack([means[places[row]] for row in rows]), values[rows])
