"""CKA against its definitions with whole kernel matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tldist.errors import DomainError
from tldist.features.measures.similarity import CrossSums, cka_matrix, cka_of_sums, linear_cka, unbiased_cka
from tldist.features.moments import Moments, merge_moments


def layers(n: int, widths: tuple[int, ...], seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(n, 3))
    return [
        hidden @ random.normal(size=(3, width)) + random.normal(size=(n, width)) + random.normal(size=width)
        for width in widths
    ]


def hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Biased: tr(KHLH)."""
    centre = np.eye(len(k)) - 1 / len(k)
    return float(np.trace(k @ centre @ l @ centre))


def unbiased_hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Eq. 3 of arXiv:2010.15327, with matrices."""
    n, ones = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    total = np.trace(k @ l) + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float(total - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3))


@pytest.mark.parametrize(("n", "widths"), [(50, (4, 7)), (6, (9, 20)), (30, (1, 60)), (12, (12, 12))])
def test_cka__is_its_definition(n: int, widths: tuple[int, int]) -> None:
    x, y = layers(n, widths, seed=n)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert linear_cka(x, y) == pytest.approx(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)), rel=1e-10)
    u = unbiased_hsic
    assert unbiased_cka(x, y) == pytest.approx(u(k, l) / np.sqrt(u(k, k) * u(l, l)), rel=1e-9)


def test_cka__turned_and_scaled_layers_are_the_same() -> None:
    (x,) = layers(40, (5,), seed=1)
    turned = x @ np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))[0] * 7 + 3
    assert linear_cka(x, turned) == pytest.approx(1)
    assert unbiased_cka(x, turned) == pytest.approx(1)


def test_unbiased_cka__of_unrelated_layers_is_about_zero_where_the_biased_one_is_large() -> None:
    random = np.random.default_rng(2)
    pairs = [(random.normal(size=(30, 100)), random.normal(size=(30, 100))) for _ in range(20)]
    assert np.mean([linear_cka(*pair) for pair in pairs]) > 0.5
    assert abs(np.mean([unbiased_cka(*pair) for pair in pairs])) < 0.02


def test_cka__of_a_constant_layer_is_zero() -> None:
    (x,) = layers(10, (3,), seed=1)
    for constant in (np.zeros((10, 2)), np.full((10, 2), 0.1)):  # the mean of ten times 0.1 is not 0.1
        assert linear_cka(x, constant) == 0
        assert unbiased_cka(x, constant) == 0
        assert cka_matrix(Moments.from_batch(np.concatenate([x, constant], axis=1)), (3, 2))[0, 1] == 0


@pytest.mark.parametrize("cuts", [[], [1, 2], [10, 11, 40]])
def test_cka_matrix__of_merged_moments_is_that_of_all_pairs(cuts: list[int]) -> None:
    widths = (3, 8, 1, 5)
    parts = [*layers(60, widths, seed=4)]
    parts[2] = np.full((60, 1), 0.1)  # a constant layer
    joined = np.concatenate(parts, axis=1)
    moments = merge_moments(Moments.from_batch(part) for part in np.split(joined, cuts))
    assert moments is not None
    found = cka_matrix(moments, widths)
    expected = [[linear_cka(a, b) for b in parts] for a in parts]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
    assert torch.equal(found, found.T)


def test_cka_matrix__widths_must_fit() -> None:
    with pytest.raises(DomainError, match="sum to 3, but the moments have 4"):
        cka_matrix(Moments.from_batch(np.ones((3, 4))), (1, 2))


@pytest.mark.parametrize("cuts", [[1], [5, 30], list(range(1, 40))])
def test_cross_sums__any_split_and_any_origin_give_the_unbiased_hsic(cuts: list[int]) -> None:
    x, y = layers(40, (6, 4), seed=7)
    expected = unbiased_hsic(x @ x.T, y @ y.T)
    for shift in (0.0, 10.0):
        parts = [
            CrossSums.from_batch(a + shift, b - shift) for a, b in zip(np.split(x, cuts), np.split(y, cuts))
        ]
        total = parts[0]
        for part in parts[1:]:
            total = total.merge(part)
        assert total.hsic == pytest.approx(expected, rel=1e-8)


def test_cka_of_sums__streams_what_unbiased_cka_computes() -> None:
    x, y = layers(40, (6, 4), seed=7)
    halves = [(x[:13], y[:13]), (x[13:], y[13:])]

    def merged(first: int, second: int) -> CrossSums:
        return CrossSums.from_batch(halves[0][first], halves[0][second]).merge(
            CrossSums.from_batch(halves[1][first], halves[1][second])
        )

    found = cka_of_sums(merged(0, 1), merged(0, 0), merged(1, 1))
    assert found == pytest.approx(unbiased_cka(x, y), rel=1e-9)


def test_cka__refuses_too_few_or_other_images() -> None:
    x, y = layers(10, (2, 3), seed=1)
    with pytest.raises(DomainError, match="10 and 9 rows"):
        linear_cka(x, y[:9])
    with pytest.raises(DomainError, match="10 and 9 rows"):
        CrossSums.from_batch(x, y[:9])
    with pytest.raises(DomainError, match="at least 4 images, found 3"):
        unbiased_cka(x[:3], y[:3])
