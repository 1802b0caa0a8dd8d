"""LEEP and its kin: what a model's own classes tell about the labels of another domain."""

from __future__ import annotations

import torch

from tldist.errors import DomainError, needs
from tldist.features.arrays import Values, as_features, as_labels
from tldist.features.maps import principal
from tldist.features.moments import Moments

_ENERGY = 0.8
_COMPONENTS_PER_CLASS = 5


def leep(probabilities: Values, labels: Values) -> float:
    """The log expected empirical prediction, mean over images; at most 0, larger is better.

    Nguyen et al. (arXiv:2002.12462), section 3: the labels are predicted through the joint distribution
    of them and of the classes that the model was trained on.

    Args:
        probabilities: (N, Z), of the model's own classes; rows sum to 1.
        labels: whole numbers (N,).

    Raises:
        DomainError: rows that are not probabilities (logits, say).
    """
    theta = as_features(probabilities, "the probabilities")
    if bool((theta < 0).any()) or bool(((theta.sum(1) - 1).abs() > 1e-3).any()):
        raise DomainError(
            "the probabilities are negative or do not sum to 1 in each row. Give the softmax of the logits."
        )
    classes, places = torch.unique(as_labels(labels, len(theta)), return_inverse=True)
    answers = torch.nn.functional.one_hot(places, len(classes)).double().to(theta.device)
    joint = answers.T @ theta / len(theta)  # P(y, z)
    marginal = joint.sum(0)
    given = joint / marginal.where(marginal > 0, torch.ones_like(marginal))  # P(y | z)
    expected = (theta @ given.T).gather(1, places[:, None].to(theta.device))
    return float(expected.clamp_min(1e-300).log().mean())


def nleep(features: Values, labels: Values, *, seed: int = 0) -> float:
    """LEEP with the components of a Gaussian mixture in the place of a model's classes.

    Li et al. (arXiv:2011.11200): needs no head. As there, the features' principal components
    that hold 80 % of the variance, and five components a class (fewer where images are few). The mixture,
    with diagonal covariances so that a thousand dimensions stay feasible, is fitted by scikit-learn.

    Args:
        features: (N, D).
        labels: whole numbers (N,).
        seed: of the mixture's start.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    with needs("demo"):
        from sklearn.mixture import GaussianMixture
    values = as_features(features, at_least=2).cpu()
    targets = as_labels(labels, len(values))
    moments = Moments.from_batch(values)
    spectrum = torch.linalg.eigvalsh(moments.covariance).flip(0).clamp_min(0)
    energy = spectrum.cumsum(0) / spectrum.sum().clamp_min(1e-300)
    kept = int((energy < _ENERGY).sum()) + 1
    points = principal(moments, min(kept, moments.width))(values).numpy()
    components = min(_COMPONENTS_PER_CLASS * len(targets.unique()), max(1, len(values) // 2))
    mixture = GaussianMixture(components, covariance_type="diag", random_state=seed).fit(points)
    return leep(mixture.predict_proba(points), targets)
