"""Proxy A-distance against scikit-learn, and all measures together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tldist.errors import DomainError
from tldist.features.measures.domains import Measures, measure_domains
from tldist.features.measures.gaussian import coral_distance, frechet_distance
from tldist.features.measures.mmd import squared_mmd
from tldist.features.measures.separation import L2, proxy_a_distance
from tldist.features.moments import Moments


def domains(n: int, m: int, shift: float, seed: int = 0, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.normal(size=(n, width)), random.normal(size=(m, width)) + shift


def test_proxy_a_distance__is_two_where_domains_are_apart_and_about_zero_where_they_are_not() -> None:
    assert proxy_a_distance(*domains(40, 60, 20.0)) == 2.0
    same = [proxy_a_distance(*domains(100, 100, 0.0, seed)) for seed in range(8)]
    assert abs(np.mean(same)) < 0.15
    assert min(same) < 0 < max(same)


def test_proxy_a_distance__is_that_of_scikit_learns_classifier() -> None:
    x, y = domains(90, 90, 0.6, seed=3)
    parts = torch.randperm(90, generator=torch.Generator().manual_seed(7)).numpy() % 3
    values, labels = np.concatenate([x, y]), np.repeat([0, 1], 90)
    parts, wrong = np.tile(parts, 2), 0
    for part in range(3):
        seen = parts != part
        centre, scale = values[seen].mean(0), np.sqrt(values[seen].var(0).mean())
        inputs = (values - centre) / scale
        model = LogisticRegression(C=2 / (L2 * seen.sum()), tol=1e-9, max_iter=5000)
        model.fit(inputs[seen], labels[seen])
        wrong += int((model.predict(inputs[~seen]) != labels[~seen]).sum())
    found = proxy_a_distance(x, y, folds=3, seed=7)
    assert 0.2 < found < 1.8
    assert found == pytest.approx(2 * (1 - 2 * wrong / 180), abs=1e-12)


def test_proxy_a_distance__uneven_domains_are_cut_to_one_size() -> None:
    # a classifier that always says "target" would be right in 95 % of an uncut sample
    assert abs(np.mean([proxy_a_distance(*domains(30, 600, 0.0, seed)) for seed in range(8)])) < 0.4


def test_proxy_a_distance__refuses_too_few_rows() -> None:
    with pytest.raises(DomainError, match="source's features: 4 rows, expected at least 5"):
        proxy_a_distance(*domains(4, 10, 0.0))


def test_measure_domains__fall_when_domains_come_nearer() -> None:
    x, y = domains(150, 150, 2.0, seed=1)
    far, near = measure_domains(x, y), measure_domains(x, y - 1.9)
    for name in ("mmd", "mmd_linear", "a_distance", "frechet"):
        assert getattr(near, name) < 0.5 * getattr(far, name), name
    stretched = measure_domains(x, (y - 2) * 3)
    assert stretched.coral > 5 * near.coral


def test_measure_domains__a_common_scale_brings_nothing_nearer() -> None:
    x, y = domains(60, 80, 1.0, seed=2)
    plain, small = measure_domains(x, y), measure_domains(x * 1e-3, y * 1e-3)
    assert plain.to_dict() == pytest.approx(small.to_dict(), rel=1e-6)


def test_measure_domains__agree_with_each_measure_alone() -> None:
    x, y = domains(60, 60, 1.0, seed=2)
    pooled = np.concatenate([x, y])
    scale = np.sqrt(((x.var(0, ddof=1) + y.var(0, ddof=1)) / 2 + (x.mean(0) - y.mean(0)) ** 2 / 4).mean())
    assert scale == pytest.approx(np.sqrt(pooled.var(0).mean()), rel=0.02)
    moments = Moments.from_batch(x / scale), Moments.from_batch(y / scale)
    found = measure_domains(x, y)
    assert found.mmd == pytest.approx(squared_mmd(x, y))
    assert found.a_distance == proxy_a_distance(x, y)
    assert found.coral == pytest.approx(coral_distance(*moments))
    assert found.frechet == pytest.approx(frechet_distance(*moments))
    assert (found.source_count, found.target_count) == (60, 60)


def test_measure_domains__moments_of_all_features_beside_a_sample() -> None:
    x, y = domains(400, 300, 1.0, seed=5)
    whole = measure_domains(x, y)
    part = measure_domains(x[::4], y[::4], moments=(Moments.from_batch(x), Moments.from_batch(y)))
    assert (part.coral, part.frechet) == (whole.coral, whole.frechet)
    assert (part.source_count, part.target_count) == (400, 300)
    assert part.mmd != whole.mmd


def test_measures__are_plain_data() -> None:
    values = measure_domains(*domains(20, 20, 1.0)).to_dict()
    assert json.loads(json.dumps(values)) == values
    unknown = Measures(1, 1, 0.0, 0.0, float("inf"), 0.0, 0.0, 0.0).to_dict()
    assert unknown["mmd_linear_error"] is None
