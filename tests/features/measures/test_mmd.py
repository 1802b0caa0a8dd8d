"""MMD against scikit-learn's kernels and sums written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

from tldist.errors import DomainError
from tldist.features import arrays
from tldist.features.measures.mmd import (
    FACTORS,
    linear_mmd,
    median_bandwidth,
    several_bandwidths,
    squared_mmd,
)


def domains(n: int, m: int, width: int, seed: int, shift: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(width, width))
    return random.normal(size=(n, width)) @ mixing, random.normal(size=(m, width)) @ mixing * 1.3 + shift


def reference(x: np.ndarray, y: np.ndarray, bandwidths: tuple[float, ...]) -> float:
    """Lemma 6 with whole matrices."""
    total = 0.0
    for b in bandwidths:
        xx, yy, xy = (rbf_kernel(*pair, gamma=1 / (2 * b * b)) for pair in ((x, x), (y, y), (x, y)))
        np.fill_diagonal(xx, 0), np.fill_diagonal(yy, 0)
        total += xx.sum() / (len(x) * (len(x) - 1)) + yy.sum() / (len(y) * (len(y) - 1)) - 2 * xy.mean()
    return total / len(bandwidths)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 55, 3), (2, 2, 1), (12, 90, 30)])
def test_squared_mmd__is_the_unbiased_estimate(n: int, m: int, width: int) -> None:
    x, y = domains(n, m, width, seed=n)
    for bandwidths in ((1.0,), (0.5, 2.0, 7.0)):
        assert squared_mmd(x, y, bandwidths) == pytest.approx(reference(x, y, bandwidths), abs=1e-12)
    assert squared_mmd(x, y) == pytest.approx(reference(x, y, several_bandwidths(x, y)), abs=1e-12)


def test_squared_mmd__blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = domains(61, 47, 4, seed=2)
    whole = squared_mmd(x, y)
    monkeypatch.setattr(arrays, "_CHUNK_NUMBERS", 300)
    assert len(arrays.blocks_of_rows(61, 61)) > 10
    assert squared_mmd(x, y) == pytest.approx(whole, abs=1e-13)


def test_squared_mmd__large_means_lose_nothing() -> None:
    x, y = domains(30, 30, 4, seed=2)
    assert squared_mmd(x + 1e7, y + 1e7, (1.0,)) == pytest.approx(squared_mmd(x, y, (1.0,)), abs=1e-7)


def test_squared_mmd__of_one_distribution_is_zero_on_average_and_grows_with_the_shift() -> None:
    same = [squared_mmd(*domains(50, 60, 3, seed, 0.0), (1.0,)) for seed in range(40)]
    random = np.random.default_rng(0)
    equal = [squared_mmd(random.normal(size=(40, 3)), random.normal(size=(50, 3)), (1.0,)) for _ in range(80)]
    assert abs(np.mean(equal)) < 3 * np.std(equal) / 80**0.5
    assert min(equal) < 0
    far = squared_mmd(*domains(50, 60, 3, 0, 6.0))
    assert far > 10 * max(same)


def test_bandwidths__are_multiples_of_the_median_distance() -> None:
    x, y = domains(30, 20, 5, seed=1)
    both = np.concatenate([x, y])
    median = np.median(euclidean_distances(both)[np.triu_indices(50, 1)])
    assert median_bandwidth(x, y) == pytest.approx(median, rel=1e-9)
    assert several_bandwidths(x, y) == pytest.approx([factor * median for factor in FACTORS])


def test_bandwidths__where_most_or_all_points_are_one() -> None:
    mostly = np.zeros((20, 2))
    mostly[0] = 3.0
    assert 0 < median_bandwidth(mostly, np.zeros((20, 2))) < 1
    assert median_bandwidth(np.ones((5, 2)), np.ones((5, 2))) == 1.0
    assert squared_mmd(np.ones((5, 2)), np.ones((5, 2))) == 0.0


@pytest.mark.parametrize(("n", "m"), [(41, 60), (2, 3), (30, 30)])
def test_linear_mmd__is_lemma_14_over_disjoint_pairs(n: int, m: int) -> None:
    x, y = domains(n, m, 3, seed=4)
    found = linear_mmd(x, y, (1.5,), seed=5)
    generator = torch.Generator().manual_seed(5)
    left, right = (a[torch.randperm(len(a), generator=generator).numpy()] for a in (x, y))
    terms = []
    for i in range(min(n, m) // 2):
        x1, x2, y1, y2 = (a[2 * i + j][None] for a in (left, right) for j in (0, 1))
        k = [rbf_kernel(*pair, gamma=1 / 4.5)[0, 0] for pair in ((x1, x2), (y1, y2), (x1, y2), (x2, y1))]
        terms.append(k[0] + k[1] - k[2] - k[3])
    assert found.value == pytest.approx(np.mean(terms), abs=1e-12)
    expected = np.std(terms, ddof=1) / len(terms) ** 0.5 if len(terms) > 1 else np.inf
    assert found.error == pytest.approx(expected)


def test_linear_mmd__error_covers_the_quadratic_estimate_though_rows_lie_class_by_class() -> None:
    random = np.random.default_rng(3)
    classes = np.sort(random.integers(0, 5, 3000))
    x = random.normal(size=(3000, 4)) + 3 * classes[:, None]
    y = random.normal(size=(3000, 4)) + 3 * classes[:, None] + 1
    found, exact = linear_mmd(x, y, (4.0,)), squared_mmd(x[::3], y[::3], (4.0,))
    assert abs(found.value - exact) < 4 * found.error
    assert found.error < 0.02


def test_mmd__takes_tensors_and_refuses_what_cannot_be_compared() -> None:
    x, y = domains(10, 10, 3, seed=1)
    assert squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == squared_mmd(x, y)
    assert squared_mmd(x.astype(np.float32), y) == pytest.approx(squared_mmd(x, y), abs=1e-6)
    with pytest.raises(DomainError, match="source's features have 3 dimensions, the target's 2"):
        squared_mmd(x, y[:, :2])
    with pytest.raises(DomainError, match="source's features: 1 rows, expected at least 2"):
        linear_mmd(x[:1], y)
