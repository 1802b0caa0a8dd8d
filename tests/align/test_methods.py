"""Alignments against closed forms and an independent float64 computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

from tldist.align.methods import METHODS, coral, standardize
from tldist.features.moments import Moments


def domain(count: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(count, width)) @ random.normal(size=(width, width))
        + random.normal(size=width) * 4
    )


def moments(values: np.ndarray) -> Moments:
    return Moments.from_batch(values)


def mapped(values: np.ndarray, transform: torch.nn.Module | None) -> np.ndarray:
    assert transform is not None
    return transform(torch.from_numpy(values)).numpy()


@pytest.mark.parametrize(("width", "ridge"), [(3, 1.0), (8, 0.1), (8, 0.0), (20, 1e-3)])
def test_coral__agrees_with_scipy(width: int, ridge: float) -> None:
    source, target = domain(200, width, 1), domain(150, width, 2)
    fit = coral(moments(source), moments(target), ridge)
    covariances = [np.cov(values, rowvar=False) for values in (source, target)]
    c_s, c_t = (c + ridge * np.trace(c) / width * np.eye(width) for c in covariances)
    whiten, colour = fractional_matrix_power(c_s, -0.5), fractional_matrix_power(c_t, 0.5)
    expected = (source - source.mean(0)) @ whiten @ colour + target.mean(0)
    np.testing.assert_allclose(mapped(source, fit.source), expected, rtol=1e-6, atol=1e-8)
    assert fit.target is None


def test_coral__is_the_papers_on_standardised_features() -> None:
    source, target = domain(300, 6, 3), domain(200, 6, 4)
    source, target = ((v - v.mean(0)) / v.std(0, ddof=1) for v in (source, target))
    c_s, c_t = (np.cov(values, rowvar=False) + np.eye(6) for values in (source, target))
    expected = source @ fractional_matrix_power(c_s, -0.5) @ fractional_matrix_power(c_t, 0.5)
    fit = coral(moments(source), moments(target), ridge=1.0)
    np.testing.assert_allclose(mapped(source, fit.source), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("width", [1, 4, 30])
def test_coral__source_takes_the_targets_mean_and_covariance(width: int) -> None:
    source, target = domain(400, width, 5), domain(300, width, 6)
    moved = mapped(source, coral(moments(source), moments(target), ridge=0.0).source)
    np.testing.assert_allclose(moved.mean(0), target.mean(0), atol=1e-8)
    np.testing.assert_allclose(
        np.cov(moved, rowvar=False), np.cov(target, rowvar=False), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0, 100.0])
def test_coral__one_domain_is_identity(ridge: float) -> None:
    values = domain(100, 7, 7)
    np.testing.assert_allclose(
        mapped(values, coral(moments(values), moments(values), ridge).source), values, atol=1e-8
    )


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_coral__units_do_not_matter(ridge: float) -> None:
    source, target = domain(100, 5, 8), domain(100, 5, 9)
    plain = mapped(source, coral(moments(source), moments(target), ridge).source)
    scaled = mapped(source * 1e-3, coral(moments(source * 1e-3), moments(target * 1e3), ridge).source)
    np.testing.assert_allclose(scaled, plain * 1e3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_coral__fewer_samples_than_dimensions_stays_finite(ridge: float) -> None:
    source, target = domain(10, 40, 10), domain(6, 40, 11)
    moved = mapped(source, coral(moments(source), moments(target), ridge).source)
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() < 100 * np.abs(target).max()


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_standardize__closed_form(ridge: float) -> None:
    source, target = domain(80, 9, 12), domain(60, 9, 13)
    fit = standardize(moments(source), moments(target), ridge)
    for values, transform in ((source, fit.source), (target, fit.target)):
        variance = values.var(0, ddof=1)
        expected = (values - values.mean(0)) / np.sqrt(variance + ridge * variance.mean())
        np.testing.assert_allclose(mapped(values, transform), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_standardize__constant_dimension_is_centred(ridge: float) -> None:
    source, target = domain(50, 3, 14), domain(50, 3, 15)
    source[:, 1], target[:, 1] = 0.1, 7.0
    fit = standardize(moments(source), moments(target), ridge)
    np.testing.assert_allclose(mapped(source, fit.source)[:, 1], 0, atol=1e-12)
    np.testing.assert_allclose(mapped(target, fit.target)[:, 1], 0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_methods__all_give_finite_maps_for_constant_features(name: str) -> None:
    flat = np.ones((5, 4))
    fit = METHODS[name].fit(moments(flat), moments(flat * 2), 1.0)
    assert np.isfinite(mapped(flat, fit.source)).all()
