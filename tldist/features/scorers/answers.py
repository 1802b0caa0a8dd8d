"""Scores of a model's answers to target images: how sure they are, and how varied."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.features.arrays import Values, as_features


def probabilities(logits: Values) -> Tensor:
    """Logits (N, K) to probabilities, float64 (N, K)."""
    return as_features(logits, "the logits").softmax(1)


def entropy_of(distributions: Tensor) -> Tensor:
    """The entropy in nats of each row (..., K); 0 log 0 is 0."""
    return -torch.special.xlogy(distributions, distributions).sum(-1)


def mean_entropy(logits: Values) -> float:
    """The entropy of an answer in nats, mean over images; small is sure.

    Morerio et al. (arXiv:1711.10288). Least for a model that gives all images one answer.

    Args:
        logits: (N, K), of target images.
    """
    return float(entropy_of(probabilities(logits)).mean())


def information_maximisation(logits: Values) -> float:
    """The entropy of the mean answer less the mean entropy of the answers, in nats; large is good.

    The mutual information of image and answer: Shi and Sha (arXiv:1206.6438); SHOT's L_IM
    (arXiv:2002.08546) with the other sign. From 0 (all answers the same) to log K.
    """
    answers = probabilities(logits)
    return float(entropy_of(answers.mean(0)) - entropy_of(answers).mean())


def nuclear_norm(logits: Values) -> float:
    """The nuclear norm of the matrix of answers, divided by N; large is sure and varied.

    BNM (arXiv:2003.12237), over all images at once. At most the root of K / N.
    """
    answers = probabilities(logits)
    return float(torch.linalg.svdvals(answers).sum()) / len(answers)
