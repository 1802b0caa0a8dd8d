"""Transferability scores against scikit-learn, SciPy and sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from tldist.errors import DomainError
from tldist.features.transferability.hscore import (
    h_score,
    ledoit_wolf_shrinkage,
    regularised_h_score,
)
from tldist.features.transferability.leep import leep, nleep
from tldist.features.transferability.logme import logme
from tldist.features.transferability.neighbours import knn_accuracy


def problem(
    n: int, width: int, classes: int, seed: int, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    centres = random.normal(size=(classes, width)) * spread
    return centres[labels] + random.normal(size=(n, width)), labels


# -- LogME -------------------------------------------------------------------------------------------------


def log_evidence(features: np.ndarray, answers: np.ndarray, alpha: float, beta: float) -> float:
    """Of y ~ N(0, I / beta + F F^T / alpha): the weights integrated out."""
    covariance = np.eye(len(features)) / beta + features @ features.T / alpha
    return float(multivariate_normal.logpdf(answers, np.zeros(len(features)), covariance))


def best_evidence(features: np.ndarray, labels: np.ndarray) -> float:
    found = []
    for label in np.unique(labels):
        answers = (labels == label).astype(float)
        starts = [
            minimize(
                lambda x, y=answers: -log_evidence(features, y, np.exp(x[0]), np.exp(x[1])),
                start,
                method="Nelder-Mead",
                options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000},
            ).fun
            for start in ([0.0, 0.0], [3.0, 2.0])
        ]
        found.append(-min(starts) / len(features))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("n", "width", "classes"), [(30, 4, 2), (24, 6, 3), (12, 20, 2)], ids=["two", "three", "wide"]
)
def test_logme__is_the_maximum_of_the_evidence(n: int, width: int, classes: int) -> None:
    values, labels = problem(n, width, classes, seed=width, spread=0.7)
    assert logme(values, labels) == pytest.approx(best_evidence(values, labels), abs=1e-6)


def test_logme__rank_deficient_features() -> None:
    values, labels = problem(25, 3, 2, seed=1)
    doubled = np.concatenate([values, values[:, :2], np.zeros((25, 2))], axis=1)
    assert logme(doubled, labels) == pytest.approx(best_evidence(doubled, labels), abs=1e-6)


def test_logme__features_that_say_nothing_have_the_evidence_of_noise() -> None:
    labels = np.arange(20) % 2
    # with no features the best is y ~ N(0, 1 / beta): beta = N / |y|^2
    noise = 0.5 * (np.log(20 / 10) - 1 - np.log(2 * np.pi))
    assert logme(np.zeros((20, 3)), labels) == pytest.approx(noise, abs=1e-12)
    balanced = np.repeat([[1.0], [-1.0]], 2, axis=0)  # orthogonal to both classes' answers
    found = logme(np.tile(balanced, (5, 1)), np.tile([0, 1], 10))
    assert found == pytest.approx(noise, abs=1e-3)


def test_logme__features_that_fit_exactly_are_finite_and_best() -> None:
    values, labels = problem(40, 5, 3, seed=2)
    exact = np.concatenate([values, np.eye(3)[labels]], axis=1)
    assert np.isfinite(logme(exact, labels))
    assert logme(exact, labels) > logme(values, labels) + 1
    assert np.isfinite(logme(np.eye(8), np.arange(8) % 2))


def test_logme__classes_without_images_do_not_count() -> None:
    values, labels = problem(30, 4, 2, seed=3)
    assert logme(values, labels * 7) == logme(values, labels)


# -- LEEP ----------------------------------------------------------------------------------------------------


def test_leep__is_the_sum_written_out() -> None:
    random = np.random.default_rng(1)
    theta = random.dirichlet(np.ones(4), size=30)
    labels = random.integers(0, 3, 30)
    total = 0.0
    for i in range(30):
        expected = 0.0
        for z in range(4):
            joint = sum(theta[j, z] for j in range(30) if labels[j] == labels[i])
            expected += theta[i, z] * joint / theta[:, z].sum()
        total += np.log(expected)
    assert leep(theta, labels) == pytest.approx(total / 30, rel=1e-12)


def test_leep__bounds() -> None:
    labels = np.arange(30) % 3
    assert leep(np.eye(5)[labels], labels) == pytest.approx(0)  # two source classes have no mass at all
    assert leep(np.full((30, 4), 0.25), labels) == pytest.approx(-np.log(3))


def test_leep__refuses_logits() -> None:
    with pytest.raises(DomainError, match="do not sum to 1"):
        leep(np.random.default_rng(0).normal(size=(6, 3)), np.arange(6) % 2)


def test_nleep__orders_backbones_as_their_classes_are_apart() -> None:
    scores = []
    for spread in (0.0, 1.0, 3.0):
        values, labels = problem(120, 8, 3, seed=4, spread=spread)
        scores.append(nleep(values, labels))
        assert nleep(values, labels) == scores[-1]
    assert scores == sorted(scores)
    assert scores[-1] > -0.05


def test_nleep__is_leep_of_the_mixtures_components() -> None:
    from sklearn.decomposition import PCA
    from sklearn.mixture import GaussianMixture

    values, labels = problem(90, 6, 2, seed=9)
    reduced = PCA(0.8, svd_solver="full").fit_transform(values)
    mixture = GaussianMixture(10, covariance_type="diag", random_state=0).fit(reduced)
    found = nleep(values, labels)
    # signs of the axes are free; k-means++ starts from the same rows
    assert found == pytest.approx(leep(mixture.predict_proba(reduced), labels), abs=1e-6)


# -- H-score -------------------------------------------------------------------------------------------------


def between(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    means = np.stack([values[labels == label].mean(0) for label in labels])
    return np.cov(means, rowvar=False, bias=True)


@pytest.mark.parametrize(("n", "width", "classes"), [(60, 5, 3), (40, 4, 2), (15, 40, 3)])
def test_h_score__is_its_definition(n: int, width: int, classes: int) -> None:
    values, labels = problem(n, width, classes, seed=n)
    covariance = np.cov(values, rowvar=False, bias=True)
    expected = np.trace(np.linalg.pinv(covariance, rcond=1e-12) @ between(values, labels))
    assert h_score(values, labels) == pytest.approx(expected, rel=1e-8)
    if n <= width:
        assert h_score(values, labels) == pytest.approx(classes - 1)


@pytest.mark.parametrize(("n", "width", "classes"), [(60, 5, 3), (15, 40, 3), (4, 2, 2)])
def test_regularised_h_score__is_that_of_scikit_learns_ledoit_wolf(n: int, width: int, classes: int) -> None:
    values, labels = problem(n, width, classes, seed=n)
    shrunk = LedoitWolf().fit(values)
    centred = torch.from_numpy(values - values.mean(0))
    found = ledoit_wolf_shrinkage(centred, centred.T @ centred / n)
    assert found == pytest.approx(shrunk.shrinkage_, rel=1e-9)
    assert 0 < found <= 1
    expected = (1 - found) * np.trace(np.linalg.inv(shrunk.covariance_) @ between(values, labels))
    assert regularised_h_score(values, labels) == pytest.approx(expected, rel=1e-9)


def test_h_scores__of_features_without_variance_are_zero() -> None:
    labels = np.arange(6) % 2
    assert h_score(np.ones((6, 3)), labels) == 0
    assert regularised_h_score(np.ones((6, 3)), labels) == 0
    assert regularised_h_score(np.eye(2)[labels], labels) > 0.5


# -- k-NN ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 5])
@pytest.mark.parametrize("cosine", [True, False])
def test_knn_accuracy__is_scikit_learns_leave_one_out(
    k: int, cosine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, labels = problem(50, 4, 3, seed=k, spread=0.8)
    values += 2
    model = KNeighborsClassifier(k, metric="cosine" if cosine else "euclidean", algorithm="brute")
    expected = (cross_val_predict(model, values, labels, cv=LeaveOneOut()) == labels).mean()
    assert 0.3 < expected < 0.9
    assert knn_accuracy(values, labels, k=k, cosine=cosine) == pytest.approx(expected, abs=1e-12)
    monkeypatch.setattr("tldist.features.arrays._CHUNK_NUMBERS", 200)
    assert knn_accuracy(values, labels, k=k, cosine=cosine) == pytest.approx(expected, abs=1e-12)


def test_knn_accuracy__needs_more_rows_than_neighbours() -> None:
    with pytest.raises(DomainError, match="3 rows have no 3 neighbours each; at least 4 rows"):
        knn_accuracy(np.eye(3), [0, 1, 2], k=3)
    assert knn_accuracy(np.zeros((4, 2)), [1, 1, 1, 1], k=3) == 1


@pytest.mark.parametrize("score", [logme, h_score, regularised_h_score])
def test_scores__need_two_classes(score: object) -> None:
    with pytest.raises(DomainError, match="a single class"):
        score(np.eye(4), np.zeros(4, dtype=int))  # type: ignore[operator]


@pytest.mark.parametrize("score", [logme, h_score, regularised_h_score, knn_accuracy, nleep])
def test_scores__tensors_and_arrays_give_the_same(score: object) -> None:
    values, labels = problem(40, 4, 2, seed=6)
    first = score(values, labels)  # type: ignore[operator]
    assert first == score(torch.from_numpy(values), torch.from_numpy(labels))  # type: ignore[operator]
