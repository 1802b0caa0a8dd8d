"""Losses against an opponent that learns meanwhile: DANN, CDAN, MCD, and the reversed gradient.

Shapes: N source and M target images of a step, over all processes; D features, K classes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, features: Tensor, strength: float) -> Tensor:
        context.strength = strength
        return features.view_as(features)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -context.strength * gradient, None


def reverse_gradient(features: Tensor, strength: float) -> Tensor:
    """The features as they are; what comes back is multiplied by ``-strength`` (DANN, arXiv:1505.07818,
    eq. 16-17)."""
    reversed_: Tensor = _Reversed.apply(features, strength)
    return reversed_


def rise(done: float) -> float:
    """From 0 to almost 1 while training goes on: ``2 / (1 + exp(-10 p)) - 1`` (DANN, section 5.2.2).

    Args:
        done: p, the share of the samples that have been seen.
    """
    return 2 / (1 + math.exp(-10 * done)) - 1


def domain_loss(
    source: Tensor, target: Tensor, source_weights: Tensor | None = None, target_weights: Tensor | None = None
) -> Tensor:
    """How badly a discriminator tells the domains apart (DANN, eq. 9): the mean of both domains' binary
    cross-entropy. The discriminator lowers it, the features behind a reversed gradient raise it.

    Args:
        source, target: (N,) and (M,), its logits; above 0 it takes an image for one of the source.
        source_weights, target_weights: of the images, with mean 1; None: all 1 (see `entropy_weights`).
    """
    softplus = nn.functional.softplus
    losses = [
        (losses if weights is None else losses * weights).sum() / max(1, len(losses))
        for losses, weights in ((softplus(-source), source_weights), (softplus(target), target_weights))
    ]
    return (losses[0] + losses[1]) / 2


def entropy_weights(logits: Tensor) -> Tensor:
    """Weights of images by how sure the classifier is: ``1 + exp(-H)``, scaled to mean 1 (CDAN+E,
    arXiv:1705.10667, eq. 8). They do not learn.

    Args:
        logits: (N, K).
    """
    log_p = logits.detach().log_softmax(1)
    weights = 1 + torch.exp((log_p.exp() * log_p).sum(1))
    return weights * len(weights) / weights.sum()


def multilinear(features: Tensor, probabilities: Tensor) -> Tensor:
    """The products of each feature with each class's probability (CDAN, eq. 4).

    Args:
        features: (N, D).
        probabilities: (N, K).

    Returns:
        (N, K * D).
    """
    return (probabilities[:, :, None] * features[:, None, :]).flatten(1)


def random_multilinear(
    features: Tensor, probabilities: Tensor, of_features: Tensor, of_classes: Tensor
) -> Tensor:
    """The same in R dimensions, by fixed random matrices (CDAN, eq. 5): inner products agree in expectation.

    Args:
        features: (N, D).
        probabilities: (N, K).
        of_features, of_classes: (D, R) and (K, R), of independent entries with variance 1.

    Returns:
        (N, R).
    """
    return (features @ of_features) * (probabilities @ of_classes) / of_features.shape[1] ** 0.5


def discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """How far the answers of two heads are apart: the mean absolute difference of their probabilities (MCD,
    arXiv:1712.02560, eq. 2).

    Args:
        first, second: logits (M, K).
    """
    apart = (first.softmax(1) - second.softmax(1)).abs()
    return apart.sum() / max(1, apart.numel())
