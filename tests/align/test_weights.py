"""Instance weights against closed forms; their agreement with ADAPT is in test_references.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel

from tldist.align.weights import density_ratio, kmm, solve_kmm
from tldist.errors import DomainError


def shifted(seed: int, count: int = 120, width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """The target is a part of the source's space."""
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)), random.normal(size=(count, width)) * 0.6 + 0.7


def discrepancy(source: np.ndarray, target: np.ndarray, weights: np.ndarray, gamma: float) -> float:
    """The squared distance of the weighted source's mean from the target's, under the kernel."""
    share = weights / len(source)
    return float(
        share @ rbf_kernel(source, gamma=gamma) @ share
        - 2 * share @ rbf_kernel(source, target, gamma=gamma).mean(1)
        + rbf_kernel(target, gamma=gamma).mean()
    )


def test_kmm__moves_the_mean_of_the_source_to_the_targets() -> None:
    source, target = shifted(1)
    weights = kmm(source, target, gamma=0.3).numpy()
    before, after = (discrepancy(source, target, w, 0.3) for w in (np.ones(120), weights))
    assert after < 0.1 * before
    assert (weights >= 0).all()
    assert abs(weights.mean() - 1) < 0.2


def test_kmm__one_domain_weighs_all_alike() -> None:
    source, _ = shifted(2, count=40)
    np.testing.assert_allclose(kmm(source, source, gamma=0.5).numpy(), 1, atol=1e-5)


def test_kmm__blocks_are_problems_of_their_own() -> None:
    source, target = shifted(3, count=50)
    found = kmm(source, target, gamma=0.4, block=20)  # three blocks, of every third sample
    for start in range(3):
        alone = kmm(source[start::3], target, gamma=0.4)
        assert torch.equal(found[start::3], alone)


def test_kmm__gamma_is_that_of_the_mean_squared_distance() -> None:
    source, target = shifted(4, count=30)
    both = np.concatenate([source, target])
    squares = ((both[:, None] - both) ** 2).sum(2)
    gamma = 1 / (squares.sum() / (60 * 59))
    np.testing.assert_allclose(kmm(source, target).numpy(), kmm(source, target, gamma=gamma).numpy())


@pytest.mark.parametrize("slack", [0.0, 0.05])
@pytest.mark.parametrize("move", [0.2, 5.0])
def test_solve_kmm__keeps_the_sum_in_its_bounds(slack: float, move: float) -> None:
    """Weights that would be too large together, and too small."""
    random = np.random.default_rng(6)
    kernel = rbf_kernel(random.normal(size=(30, 3)), gamma=0.5)
    kappa = kernel @ random.uniform(0, 1, 30) * move
    weights = solve_kmm(kernel, kappa, 1000.0, slack * 30)
    bound = 30 * (1 + slack) if move > 1 else 30 * (1 - slack)
    assert weights.sum() == pytest.approx(bound, abs=1e-6)


def test_solve_kmm__bounds_that_cannot_be_kept_are_named() -> None:
    with pytest.raises(DomainError, match="raise most or slack"):
        solve_kmm(np.eye(10), np.full(10, 0.1), 0.5, 0.0)  # ten weights of 0.5 have no sum of 10


@pytest.mark.parametrize("counts", [(80, 80), (50, 90)])
def test_density_ratio__is_the_odds_of_a_logistic_regression(counts: tuple[int, int]) -> None:
    random = np.random.default_rng(7)
    source, target = random.normal(size=(counts[0], 3)), random.normal(size=(counts[1], 3)) + 0.8
    found = density_ratio(source, target, l2=0.05).numpy()
    both = np.concatenate([source, target])
    labels = np.repeat([0, 1], counts)
    shares = np.repeat([0.5 / counts[0], 0.5 / counts[1]], counts)
    mean = shares @ both
    scale = np.sqrt((shares @ (both - mean) ** 2).mean())
    inputs = (both - mean) / scale
    # Two rows of opposite weights are penalised as twice their half: C is 2 / l2 at weights of sum 1.
    reference = LogisticRegression(C=2 / 0.05, tol=1e-12, max_iter=10_000).fit(inputs, labels, shares)
    odds = np.exp(reference.decision_function(inputs[: counts[0]]))
    np.testing.assert_allclose(found, odds / odds.mean(), rtol=1e-3)
    assert found.mean() == pytest.approx(1)
