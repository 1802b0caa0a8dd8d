"""Distances of covariances and Gaussians against SciPy and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from tldist.errors import DomainError
from tldist.features.measures.gaussian import coral_distance, frechet_distance, pooled_scale, rescaled
from tldist.features.moments import Moments


def sample(n: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, width)) @ random.normal(size=(width, width)) + random.normal(size=width) * 3


@pytest.mark.parametrize("width", [1, 4, 9])
def test_frechet_distance__is_scipys(width: int) -> None:
    x, y = sample(200, width, 1), sample(150, width, 2)
    a, b = (np.atleast_2d(np.cov(values, rowvar=False)) for values in (x, y))
    root = scipy.linalg.sqrtm(a @ b).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root)
    found = frechet_distance(Moments.from_batch(x), Moments.from_batch(y))
    assert found == pytest.approx(expected, rel=1e-9)


def test_frechet_distance__without_full_rank() -> None:
    x = sample(5, 12, 1)  # rank 4
    moments = Moments.from_batch(x)
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6 * float(moments.variance.sum()))
    moved = Moments.from_batch(x + 2)
    assert frechet_distance(moments, moved) == pytest.approx(4 * 12, rel=1e-6)
    constant = Moments.from_batch(np.ones((3, 12)))
    expected = float(moments.variance.sum()) + ((x.mean(0) - 1) ** 2).sum()
    assert frechet_distance(moments, constant) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance__of_diagonal_gaussians_is_that_of_their_deviations() -> None:
    a = Moments(3, torch.zeros(2).double(), torch.diag(torch.tensor([4.0, 9.0]).double()) * 2)
    b = Moments(3, torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 16.0]).double()) * 2)
    assert frechet_distance(a, b) == pytest.approx(1 + (2 - 1) ** 2 + (3 - 4) ** 2)


def test_coral_distance__is_eq_1_of_deep_coral() -> None:
    x, y = sample(60, 5, 3), sample(70, 5, 4)
    expected = np.linalg.norm(np.cov(x.T) - np.cov(y.T), "fro") ** 2 / (4 * 5**2)
    assert coral_distance(Moments.from_batch(x), Moments.from_batch(y)) == pytest.approx(expected, rel=1e-12)


def test_pooled_scale__makes_distances_free_of_the_unit() -> None:
    x, y = sample(80, 4, 5), sample(80, 4, 6)
    pooled = np.concatenate([x, y])
    plain = Moments.from_batch(x), Moments.from_batch(y)
    large = Moments.from_batch(x * 50), Moments.from_batch(y * 50)
    assert pooled_scale(*plain) == pytest.approx(np.sqrt(pooled.var(0).mean()), rel=1e-2)
    for distance in (coral_distance, frechet_distance):
        first, second = (
            distance(*(rescaled(m, pooled_scale(*pair)) for m in pair)) for pair in (plain, large)
        )
        assert first == pytest.approx(second, rel=1e-9)
    assert pooled_scale(Moments.from_batch(np.ones((2, 3))), Moments.from_batch(np.ones((2, 3)))) == 1.0


def test_distances__of_other_widths_are_refused() -> None:
    first, second = Moments.from_batch(sample(9, 3, 1)), Moments.from_batch(sample(9, 4, 1))
    for distance in (coral_distance, frechet_distance, pooled_scale):
        with pytest.raises(DomainError, match="3 dimensions, the target's 4"):
            distance(first, second)
