"""Heads by nearness against scikit-learn and the classifiers' definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from tldist.features.nearest import (
    fit_class_means,
    fit_neighbours,
    sweep_class_means,
    sweep_neighbours,
)


def problem(count: int, width: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    values = random.normal(size=(classes, width))[labels] * 1.5 + random.normal(size=(count, width)) + 100
    return torch.from_numpy(values), torch.from_numpy(labels)


@pytest.mark.parametrize(("classes", "width"), [(2, 1), (3, 7), (5, 30)])
def test_fit_class_means__answers_as_scikit_learn(classes: int, width: int) -> None:
    values, labels = problem(60, width, classes, seed=classes)
    head = fit_class_means(values, labels, classes)
    reference = NearestCentroid().fit(values, labels)
    np.testing.assert_array_equal(head.logits(values).argmax(1), reference.predict(values))


def test_fit_class_means__logits_are_those_of_gaussians() -> None:
    values, labels = problem(90, 4, 3, seed=9)
    means = torch.stack([values[labels == c].mean(0) for c in range(3)])
    within = (values - means[labels]).square().mean()
    squares = (values[:, None] - means).square().sum(2)
    expected = torch.softmax(-0.3 * squares / within / 2, 1)
    found = fit_class_means(values, labels, 3, sharpness=0.3).logits(values).softmax(1)
    torch.testing.assert_close(found, expected)


def test_fit_class_means__weights_and_absent_classes() -> None:
    values, labels = problem(30, 4, 3, seed=3)
    counts = torch.arange(30) % 3 + 1
    weighted = fit_class_means(values, labels, 4, weights=counts.double())
    repeated = fit_class_means(values.repeat_interleave(counts, 0), labels.repeat_interleave(counts), 4)
    torch.testing.assert_close(weighted.logits(values), repeated.logits(values))
    for place in (values, values + 1e6, values - 1e6, values * -1e3):
        assert not (weighted.logits(place).argmax(1) == 3).any()  # class 3 has no sample
    lone = fit_class_means(torch.ones(1, 4), torch.zeros(1).long(), 2)
    assert torch.isfinite(lone.logits(values)).all()


@pytest.mark.parametrize("k", [1, 7])
def test_fit_neighbours__answers_as_scikit_learn(k: int) -> None:
    values, labels = problem(80, 6, 3, seed=4)
    values = values - values.mean(0)
    stored, asked = values[:50], values[50:]
    head = fit_neighbours(stored, labels[:50], 3, k=k, temperature=0.2)
    reference = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.2)
    ).fit(stored, labels[:50])
    expected = 0.99 * reference.predict_proba(asked) + 0.01 / 3
    np.testing.assert_allclose(head.logits(asked).exp().numpy(), expected, atol=1e-9)


def held_out_loss(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits, labels))


def test_sweep_class_means__chooses_by_the_held_out_samples() -> None:
    values, labels = problem(60, 20, 3, seed=5)
    held = torch.arange(60) % 4 == 0
    sweep = sweep_class_means(values, labels, 3, held, grid=(1.0, 0.3, 0.1))
    losses = [
        held_out_loss(
            fit_class_means(values[~held], labels[~held], 3, sharpness=s).logits(values[held]), labels[held]
        )
        for s in (1.0, 0.3, 0.1)
    ]
    assert [loss for _, loss in sweep.tried] == pytest.approx(losses)
    assert sweep.held_out_loss == pytest.approx(min(losses))
    best = (1.0, 0.3, 0.1)[int(np.argmin(losses))]
    expected = fit_class_means(values, labels, 3, sharpness=best)
    assert torch.equal(sweep.head.weight, expected.weight)


def test_sweep_neighbours__chooses_by_the_held_out_samples_and_stores_all() -> None:
    values, labels = problem(60, 4, 3, seed=6)
    values = values - values.mean(0)
    held = torch.arange(60) % 4 == 0
    sweep = sweep_neighbours(values, labels, 3, held)
    assert [k for k, _ in sweep.tried] == [1, 5, 10, 20]  # 45 are seen: 50 cannot vote
    logits = fit_neighbours(values[~held], labels[~held], 3, k=sweep.head.module.k).logits(values[held])
    assert sweep.held_out_loss == pytest.approx(min(loss for _, loss in sweep.tried))
    assert sweep.held_out_loss == pytest.approx(held_out_loss(logits, labels[held]))
    assert sweep.held_out_accuracy == pytest.approx(float((logits.argmax(1) == labels[held]).double().mean()))
    assert len(sweep.head.tensors()["weight"]) == 60
    assert sweep_neighbours(values[:4], labels[:4], 3, torch.tensor([0, 0, 0, 1]).bool(), grid=(9,)).tried
