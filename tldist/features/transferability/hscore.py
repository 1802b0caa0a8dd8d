"""H-score: the share of the features' variance that lies between classes."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, as_labels


def h_score(features: Values, labels: Values) -> float:
    """``tr(cov(f)^+ cov(E[f | y]))``, from 0 to (number of classes - 1); larger is better.

    Bao et al. (ICIP 2019). Directions without variance do not count. With fewer images than
    dimensions it is as large as can be for any features: see `regularised_h_score`.

    Args:
        features: (N, D).
        labels: whole numbers (N,), at least two classes among them.

    Raises:
        DomainError: a single class.
    """
    centred, means = _centred_and_means(features, labels)
    return _between_share(centred.T @ centred / len(centred), means, len(centred))


def regularised_h_score(features: Values, labels: Values) -> float:
    """The H-score with the covariance shrunk to a multiple of the identity (Ledoit and Wolf, 2004).

    Ibrahim et al. (arXiv:2110.06893): ``tr(cov_a(f)^-1 (1 - a) cov(E[f | y]))`` where the
    shrinkage a comes from the features in closed form. 0 for features without variance.

    Args:
        features: (N, D).
        labels: whole numbers (N,), at least two classes among them.
    """
    centred, means = _centred_and_means(features, labels)
    covariance = centred.T @ centred / len(centred)
    amount = ledoit_wolf_shrinkage(centred, covariance)
    average = covariance.diagonal().mean()
    shrunk = (1 - amount) * covariance + amount * average * torch.eye(len(covariance)).to(covariance)
    return (1 - amount) * _between_share(shrunk, means, len(centred))


def ledoit_wolf_shrinkage(centred: Tensor, covariance: Tensor) -> float:
    """The share of the identity, 0 to 1, that makes a covariance's expected squared error least.

    Ledoit and Wolf (J. Multivariate Analysis 88, 2004), lemma 3.2 to 3.5.

    Args:
        centred: float64 (N, D), of mean 0.
        covariance: float64 (D, D), divided by N.
    """
    error = centred.square().sum(1).square().mean() - covariance.square().sum()
    identity = torch.eye(len(covariance)).to(covariance)
    spread = (covariance - covariance.diagonal().mean() * identity).square().sum()
    if error <= 0 or spread <= 0:
        return 0.0 if error <= 0 else 1.0
    return min(1.0, float(error / len(centred) / spread))


def _centred_and_means(features: Values, labels: Values) -> tuple[Tensor, Tensor]:
    """Centred features (N, D); class means (K, D), each times the root of its number of images."""
    values = as_features(features)
    classes, places = torch.unique(as_labels(labels, len(values)), return_inverse=True)
    if len(classes) < 2:
        raise DomainError("the labels name a single class; a score needs at least two.")
    answers = torch.nn.functional.one_hot(places, len(classes)).double().to(values.device)
    centred = values - values.mean(0)
    return centred, answers.T @ centred / answers.sum(0).sqrt()[:, None]


def _between_share(covariance: Tensor, means: Tensor, count: int) -> float:
    """tr(covariance^+ means^T means / N)."""
    values, vectors = torch.linalg.eigh(covariance)
    alive = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
    if not alive.any():
        return 0.0
    return float(((means @ vectors[:, alive]).square() / values[alive]).sum()) / count
