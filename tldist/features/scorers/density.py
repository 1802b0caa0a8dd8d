"""Soft neighbourhood density: whether images have their answer in common with many others."""

from __future__ import annotations

import torch

from tldist.features.arrays import Values, blocks_of_rows
from tldist.features.scorers.answers import probabilities

TEMPERATURE = 0.05
"""The paper's."""


def soft_neighbourhood_density(logits: Values, *, temperature: float = TEMPERATURE) -> float:
    """SND: the entropy of an image's similarities to all others, mean over images; large is dense.

    Saito et al. (arXiv:2108.10860), section 3: the softmax over the other images of the cosine similarity
    of the answers, divided by the temperature. From 0 to log(N - 1). Largest for a model that gives all
    images one answer. The N x N matrix is made block by block.

    Args:
        logits: (N, K), of target images, at least two.
        temperature: of the softmax.
    """
    answers = torch.nn.functional.normalize(probabilities(logits), dim=1)
    if len(answers) < 2:
        return 0.0
    total = 0.0
    for rows in blocks_of_rows(len(answers), len(answers)):
        similar = answers[rows] @ answers.T / temperature
        similar.diagonal(rows.start).fill_(float("-inf"))
        logs = similar.log_softmax(1)
        logs.diagonal(rows.start).zero_()  # of weight 0
        shares = logs.exp()
        shares.diagonal(rows.start).zero_()
        total -= float((shares * logs).sum())
    return total / len(answers)
