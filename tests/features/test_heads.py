"""Heads against scikit-learn and against what must hold at an optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from tldist.features.heads import fit_logistic, sweep_logistic


def problem(
    count: int, width: int, classes: int, seed: int, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(classes, width)) * spread
    labels = np.arange(count) % classes
    values = centres[labels] + random.normal(size=(count, width)) @ random.normal(size=(width, width))
    return values * random.uniform(0.1, 3) + random.normal(size=width) * 5, labels


@pytest.mark.parametrize(("classes", "width"), [(2, 3), (3, 7), (5, 12)])
@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-3])
def test_fit_logistic__agrees_with_scikit_learn(classes: int, width: int, l2: float) -> None:
    values, labels = problem(120, width, classes, seed=classes)
    head = fit_logistic(torch.from_numpy(values), torch.from_numpy(labels), classes, l2=l2)
    scale = np.sqrt(((values - values.mean(0)) ** 2).mean())
    inputs = (values - values.mean(0)) / scale
    rows = 2 if classes == 2 else 1  # scikit-learn keeps one row for two classes and penalises that
    reference = LogisticRegression(C=rows / (l2 * len(values)), tol=1e-10, max_iter=100_000)
    reference.fit(inputs, labels)
    probabilities = torch.softmax(head.logits(torch.from_numpy(values)), 1).numpy()
    np.testing.assert_allclose(probabilities, reference.predict_proba(inputs), atol=1e-4)
    assert head.converged
    if classes > 2:
        np.testing.assert_allclose(head.weight.numpy() * scale, reference.coef_, atol=1e-4)


@pytest.mark.parametrize("width", [3, 200])  # also more dimensions than samples
def test_fit_logistic__a_weight_of_two_is_a_sample_twice(width: int) -> None:
    values, labels = (torch.from_numpy(part) for part in problem(60, width, 3, seed=5))
    counts = torch.arange(60) % 3
    weighted = fit_logistic(values, labels, 3, l2=1e-2, weights=counts.double() * 0.7)
    repeated = fit_logistic(values.repeat_interleave(counts, 0), labels.repeat_interleave(counts), 3, l2=1e-2)
    torch.testing.assert_close(weighted.logits(values), repeated.logits(values), atol=1e-5, rtol=1e-5)


def test_sweep_logistic__weights_choose_and_fit() -> None:
    values, labels = (torch.from_numpy(part) for part in problem(60, 10, 3, seed=4))
    held_out = torch.arange(60) % 4 == 0
    weights = (torch.arange(60) % 5 != 0).double()  # others are as if they were not there
    there = weights > 0
    found = sweep_logistic(values, labels, 3, held_out, weights=weights)
    without = sweep_logistic(values[there], labels[there], 3, held_out[there])
    assert found.head.l2 == without.head.l2
    assert found.held_out_accuracy == pytest.approx(without.held_out_accuracy)
    assert found.held_out_loss == pytest.approx(without.held_out_loss, abs=1e-4)
    torch.testing.assert_close(found.head.weight, without.head.weight, atol=1e-5, rtol=1e-4)


def test_fit_logistic__is_deterministic() -> None:
    values, labels = (torch.from_numpy(part) for part in problem(90, 6, 3, seed=8))
    first, second = (fit_logistic(values, labels, 3, l2=1e-2) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


def test_fit_logistic__units_of_the_features_do_not_matter() -> None:
    values, labels = (torch.from_numpy(part) for part in problem(90, 6, 3, seed=2))
    plain, scaled = (
        fit_logistic(values, labels, 3, l2=1e-2),
        fit_logistic(values * 1000 + 7, labels, 3, l2=1e-2),
    )
    torch.testing.assert_close(plain.logits(values), scaled.logits(values * 1000 + 7), atol=1e-5, rtol=1e-5)


def test_fit_logistic__rotation_of_the_features_does_not_matter() -> None:
    values, labels = (torch.from_numpy(part) for part in problem(90, 6, 3, seed=2))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    plain, turned = (
        fit_logistic(values, labels, 3, l2=1e-2),
        fit_logistic(values @ rotation, labels, 3, l2=1e-2),
    )
    torch.testing.assert_close(plain.weight @ rotation, turned.weight, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("l2", [1.0, 1e-3])
def test_fit_logistic__fewer_samples_than_dimensions(l2: float) -> None:
    values, labels = problem(20, 50, 3, seed=6)
    head = fit_logistic(torch.from_numpy(values), torch.from_numpy(labels), 3, l2=l2)
    scale = np.sqrt(((values - values.mean(0)) ** 2).mean())
    reference = LogisticRegression(C=1 / (l2 * 20), tol=1e-10, max_iter=100_000)
    reference.fit((values - values.mean(0)) / scale, labels)
    np.testing.assert_allclose(head.weight.numpy() * scale, reference.coef_, atol=1e-4)


def test_fit_logistic__constant_and_absent() -> None:
    values, labels = torch.ones(20, 4), torch.arange(20) % 2
    head = fit_logistic(values, labels, 3, l2=1e-2)  # nothing to learn, and class 2 has no sample
    assert torch.isfinite(head.logits(values)).all()
    torch.testing.assert_close(head.logits(values)[:, 0], head.logits(values)[:, 1])


def test_sweep_logistic__chooses_by_the_held_out_samples() -> None:
    values, labels = (torch.from_numpy(part) for part in problem(60, 40, 3, seed=4, spread=0.5))
    held_out = torch.arange(60) % 4 == 0
    grid = (10.0, 1.0, 0.1, 1e-2, 1e-4, 1e-6)
    sweep = sweep_logistic(values, labels, 3, held_out, grid=grid)
    losses = {}
    for l2 in grid:
        head = fit_logistic(values[~held_out], labels[~held_out], 3, l2=l2)
        losses[l2] = float(torch.nn.functional.cross_entropy(head.logits(values[held_out]), labels[held_out]))
    assert sweep.head.l2 == min(losses, key=losses.__getitem__)
    assert sweep.held_out_loss == pytest.approx(
        min(losses.values()), abs=1e-3
    )  # the sweep compares rough fits
    assert len(sweep.tried) < len(grid)  # it stopped once the loss rose
    full = fit_logistic(values, labels, 3, l2=sweep.head.l2)
    torch.testing.assert_close(sweep.head.weight, full.weight, atol=1e-5, rtol=1e-5)
