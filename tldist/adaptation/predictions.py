"""Losses on what a model answers for images without labels: MCC, BNM, information maximisation.

Shapes: M target images of a step, over all processes; K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def minimum_class_confusion(logits: Tensor, temperature: float) -> Tensor:
    """How often the answers hesitate between two classes (MCC, arXiv:1912.03699, eq. 2-7).

    Args:
        logits: (M, K).
        temperature: T, above 1: answers that are too sure hide what they confuse.

    Returns:
        (), in [0, 1).
    """
    if len(logits) == 0:
        return logits.sum()
    scaled = logits / temperature
    probabilities, log_p = scaled.softmax(1), scaled.log_softmax(1)
    # Images of which the model is sure count more; the weights themselves do not learn.
    weights = 1 + torch.exp((probabilities * log_p).sum(1).detach())
    weights = weights * len(weights) / weights.sum()
    confusion = (probabilities * weights[:, None]).T @ probabilities
    shares = confusion / confusion.sum(1, keepdim=True)
    return (shares.sum() - shares.trace()) / len(shares)


def batch_nuclear_norm(logits: Tensor) -> Tensor:
    """``-||P||_* / M`` of the matrix of probabilities (BNM, arXiv:2003.12237, eq. 10): sure answers, and many
    different ones.

    Args:
        logits: (M, K).
    """
    if len(logits) == 0:
        return logits.sum()
    singular: Tensor = torch.linalg.svdvals(logits.softmax(1))
    return -singular.sum() / len(logits)


def mean_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of the answers in nats: 0 where all are sure.

    Args:
        logits: (M, K).
    """
    entropies = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    return entropies.sum() / max(1, len(entropies))


def answer_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean answer in nats: log K where all classes are answered alike often.

    Args:
        logits: (M, K).
    """
    mean = logits.softmax(1).sum(0) / max(1, len(logits))
    return -torch.special.xlogy(mean, mean.clamp(min=torch.finfo(mean.dtype).tiny)).sum()


def information_maximisation(logits: Tensor) -> Tensor:
    """Each answer sure, all together diverse: minus the mutual information of images and answers (SHOT,
    arXiv:2002.08546, eq. 3-4).

    Args:
        logits: (M, K).
    """
    return mean_entropy(logits) - answer_entropy(logits)
