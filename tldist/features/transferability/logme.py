"""LogME: the largest evidence of a linear model from features to labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, as_labels

_MOST_ITERATIONS = 500
_TOLERANCE = 1e-9
"""Relative change of alpha / beta at which the fixed point is reached."""
_LEAST_NOISE = 1e-12
"""Of the labels' size: the noise of a class that features fit exactly; else its evidence is infinite."""


def logme(features: Values, labels: Values) -> float:
    """The log of the maximum evidence for each image, mean over classes; larger is better.

    You et al. (arXiv:2102.11005), eq. 2, maximised by the optimised fixed point of You et al.
    (arXiv:2110.10545): after one singular value decomposition an iteration costs no more than
    vectors. All classes are iterated at once, until nothing changes. Classes without images do not count.

    Args:
        features: (N, D).
        labels: whole numbers (N,), at least two classes among them.

    Raises:
        DomainError: a single class.
    """
    values = as_features(features)
    classes, places = torch.unique(as_labels(labels, len(values)), return_inverse=True)
    if len(classes) < 2:
        raise DomainError("the labels name a single class; a score needs at least two.")
    answers = torch.nn.functional.one_hot(places, len(classes)).double().to(values.device)
    left, singular, _ = torch.linalg.svd(values, full_matrices=False)
    alive = singular > singular.max() * max(values.shape) * torch.finfo(torch.float64).eps
    explained = (left[:, alive].T @ answers).square()  # (R, K): x_i^2 of the paper
    rest = (answers.square().sum(0) - explained.sum(0)).clamp_min(0)
    return float(_evidence(singular[alive].square(), explained, rest, len(values)).mean())


def _evidence(sigma: Tensor, explained: Tensor, rest: Tensor, count: int) -> Tensor:
    """The maximum evidence of each class, divided by N.

    Args:
        sigma: (R,), squared singular values of the features.
        explained: (R, K), squared coordinates of the labels on the left singular vectors.
        rest: (K,), what no feature explains.
        count: N.
    """
    floor = _LEAST_NOISE * (explained.sum(0) + rest)
    spectrum = sigma[:, None]
    ratio = torch.ones_like(rest)  # t = alpha / beta
    for _ in range(_MOST_ITERATIONS):
        _, alpha, beta = _update(spectrum, explained, rest, floor, ratio, count)
        before, ratio = ratio, alpha / beta
        if bool(((ratio - before).abs() <= _TOLERANCE * before).all()):
            break
    size, alpha, beta = _update(spectrum, explained, rest, floor, ratio, count)
    residual = _residual(spectrum, explained, rest, floor, ratio)
    # D / 2 log(alpha) and the zero eigenvalues' share of the determinant cancel but for the rank.
    determinant = torch.log1p(spectrum * beta / alpha).sum(0)
    evidence = count * (beta.log() - math.log(2 * math.pi)) - determinant - beta * residual - alpha * size
    return evidence / (2 * count)


def _update(
    spectrum: Tensor, explained: Tensor, rest: Tensor, floor: Tensor, ratio: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """|m|^2, alpha and beta at a ratio t: one step of the optimised fixed point."""
    gamma = (spectrum / (spectrum + ratio)).sum(0)
    size = (spectrum * explained / (spectrum + ratio).square()).sum(0).clamp_min(1e-300)
    residual = _residual(spectrum, explained, rest, floor, ratio)
    alpha = (gamma / size).clamp_min(1e-300)
    beta = ((count - gamma) / residual).clamp_min(1e-300)
    return size, alpha, beta


def _residual(spectrum: Tensor, explained: Tensor, rest: Tensor, floor: Tensor, ratio: Tensor) -> Tensor:
    """|y - F m|^2 at a ratio t."""
    unfitted = (explained / (1 + spectrum / ratio).square()).sum(0)
    return torch.maximum(rest + unfitted, floor)
