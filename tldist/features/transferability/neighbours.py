"""k-NN accuracy: whether the nearest images of an image are of its class."""

from __future__ import annotations

import torch

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, as_labels, blocks_of_rows


def knn_accuracy(features: Values, labels: Values, *, k: int = 5, cosine: bool = True) -> float:
    """The share of images whose class most of their k nearest others have (leave-one-out), 0 to 1.

    Of classes with as many votes the first one is taken, and of neighbours as near the first rows.

    Args:
        features: (N, D).
        labels: whole numbers (N,).
        k: neighbours, at most N - 1.
        cosine: nearest by angle; else by Euclidean distance.

    Raises:
        DomainError: not more than k rows.
    """
    values = as_features(features)
    places = as_labels(labels, len(values)).to(values.device)
    if k < 1 or len(values) <= k:
        raise DomainError(
            f"{len(values)} rows have no {k} neighbours each; at least {k + 1} rows are needed."
        )
    if cosine:
        points = torch.nn.functional.normalize(values, dim=1, eps=1e-300)
    else:
        points = values - values.mean(0)
    answers = torch.nn.functional.one_hot(places)
    right = 0
    for rows in blocks_of_rows(len(points), len(points)):
        # |a - b|^2 without |a|^2, which is the same for all b
        distances = points.square().sum(1) - 2 * points[rows] @ points.T
        distances.diagonal(rows.start).fill_(float("inf"))
        nearest = distances.sort(dim=1, stable=True).indices[:, :k]
        right += int((answers[nearest].sum(1).argmax(1) == places[rows]).sum())
    return right / len(points)
