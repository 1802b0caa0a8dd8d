"""Label-free scorers against SKADA's recorded answers and against sums written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from tldist.errors import DomainError
from tldist.features.heads import fit_logistic
from tldist.features.scorers.answers import information_maximisation, mean_entropy, nuclear_norm
from tldist.features.scorers.candidate import SCORERS, SourceEvidence, judge
from tldist.features.scorers.density import soft_neighbourhood_density
from tldist.features.scorers.mixing import SHARE, Consistency, mix, mix_consistency, partners
from tldist.features.scorers.weighted import (
    dev_risk,
    effective_count,
    importance_weighted_risk,
    importance_weights,
)

SKADA = np.load(Path(__file__).with_name("skada.npz"))


def logits(n: int, classes: int, seed: int, scale: float = 2.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, classes)) * scale


# -- SKADA's answers, recorded ---------------------------------------------------------------------------


def test_entropy__is_skadas() -> None:
    # its mean is over images and classes
    classes = SKADA["target_logits"].shape[1]
    assert mean_entropy(SKADA["target_logits"]) == pytest.approx(float(SKADA["entropy"]) * classes, rel=1e-9)


def test_snd__is_skadas() -> None:
    # an image's similarity to itself has weight e^-20 / e^20 there, 0 here
    assert soft_neighbourhood_density(SKADA["target_logits"]) == pytest.approx(float(SKADA["snd"]), rel=1e-9)


def test_dev__is_skadas() -> None:
    weights, answers = torch.from_numpy(SKADA["dev_weights"]), torch.from_numpy(SKADA["dev_logits"])
    losses = torch.nn.functional.cross_entropy(
        answers, torch.from_numpy(SKADA["dev_labels"]), reduction="none"
    )
    assert dev_risk(weights, losses) == pytest.approx(float(SKADA["dev"]), rel=1e-9)


def test_importance_weights__are_skadas_with_its_classifiers_penalty() -> None:
    train, target, at = (SKADA[f"dev_{name}"] for name in ("train", "target", "at"))
    both = np.concatenate([train, target])
    # C = 1 on features as they are is this l2 on features of unit mean variance
    l2 = 2 / len(both) / both.var(0).mean()
    found = importance_weights(train, target, at, l2=l2)
    np.testing.assert_allclose(found.numpy(), SKADA["dev_weights"], rtol=2e-3)


def test_mixval__is_skadas() -> None:
    answers = torch.from_numpy(SKADA["target_logits"]).argmax(1)
    mixed = torch.from_numpy(SKADA["mixed_logits"]).argmax(1)
    found = mix_consistency(answers, torch.from_numpy(SKADA["partner"]), mixed)
    assert (found.intra, found.inter) == (float(SKADA["intra"]), float(SKADA["inter"]))


# -- written out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "classes"), [(30, 4), (1, 3), (5, 9)])
def test_answers__are_their_definitions(n: int, classes: int) -> None:
    values = logits(n, classes, seed=n)
    p = scipy.special.softmax(values, axis=1)
    entropies = scipy.stats.entropy(p, axis=1)
    assert mean_entropy(values) == pytest.approx(entropies.mean(), rel=1e-12)
    expected = scipy.stats.entropy(p.mean(0)) - entropies.mean()
    assert information_maximisation(values) == pytest.approx(expected, abs=1e-12)
    spectrum = np.sqrt(np.linalg.eigvalsh(p @ p.T).clip(0))
    assert nuclear_norm(values) == pytest.approx(spectrum.sum() / n, rel=1e-6)


def test_answers__extreme_logits_stay_finite() -> None:
    sure = np.eye(3)[np.arange(9) % 3] * 1e4
    assert mean_entropy(sure) == 0
    assert information_maximisation(sure) == pytest.approx(np.log(3))
    assert nuclear_norm(sure) == pytest.approx(np.sqrt(3 / 9))
    one = np.tile([1e4, 0, 0], (9, 1))
    assert mean_entropy(one) == 0  # as good as the right answers: why a guard is needed
    assert information_maximisation(one) == pytest.approx(0)
    assert nuclear_norm(one) == pytest.approx(1 / 3)


@pytest.mark.parametrize("n", [2, 3, 40])
def test_snd__is_its_definition(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = logits(n, 4, seed=n)
    p = scipy.special.softmax(values, axis=1)
    p /= np.linalg.norm(p, axis=1, keepdims=True)
    rows = [np.delete(p @ p[i] / 0.05, i) for i in range(n)]
    expected = np.mean([scipy.stats.entropy(scipy.special.softmax(row)) for row in rows])
    assert soft_neighbourhood_density(values) == pytest.approx(expected, abs=1e-10)
    monkeypatch.setattr("tldist.features.arrays._CHUNK_NUMBERS", n * 3)
    assert soft_neighbourhood_density(values) == pytest.approx(expected, abs=1e-10)


def test_snd__largest_where_all_answers_are_one() -> None:
    assert soft_neighbourhood_density(np.zeros((10, 3))) == pytest.approx(np.log(9))
    assert soft_neighbourhood_density(np.zeros((1, 3))) == 0


def test_importance_weights__of_two_gaussians_are_their_ratio() -> None:
    random = np.random.default_rng(0)
    source, target = random.normal(size=(4000, 1)), random.normal(size=(2500, 1)) + 0.8
    points = np.linspace(-1, 2, 7)[:, None]
    found = importance_weights(source, target, points, l2=1e-6)
    expected = scipy.stats.norm.pdf(points, 0.8) / scipy.stats.norm.pdf(points)
    np.testing.assert_allclose(found.numpy(), expected[:, 0], rtol=0.15)
    assert float(importance_weights(source, target, source).mean()) == pytest.approx(1, abs=0.05)


def test_importance_weights__of_domains_far_apart_are_finite() -> None:
    found = importance_weights(
        np.zeros((20, 2)), np.ones((20, 2)) * 1e3, np.array([[0, 0], [1e6, 1e6]]), l2=1e-9
    )
    assert torch.isfinite(found).all()
    assert bool((found > 0).all())


def test_importance_weights__one_logistic_fit_by_another_route() -> None:
    random = np.random.default_rng(1)
    source, target = random.normal(size=(30, 3)), random.normal(size=(50, 3)) + 0.5
    head = fit_logistic(
        torch.from_numpy(np.concatenate([source, target])), torch.arange(80).ge(30).long(), 2, l2=0.01
    )
    shares = head.logits(torch.from_numpy(source)).softmax(1)
    expected = 30 / 50 * shares[:, 1] / shares[:, 0]
    torch.testing.assert_close(importance_weights(source, target, source), expected)


def test_dev_risk__has_less_variance_than_the_weighted_mean_and_the_same_expectation() -> None:
    random = np.random.default_rng(2)
    plain, controlled = [], []
    for _ in range(300):
        x = random.normal(size=60)
        weights = torch.from_numpy(scipy.stats.norm.pdf(x, 0.5) / scipy.stats.norm.pdf(x))
        losses = torch.from_numpy(1 + 0.1 * x)
        plain.append(float((weights * losses).mean()))
        controlled.append(dev_risk(weights, losses))
    assert np.mean(controlled) == pytest.approx(1.05, abs=0.01)
    assert np.var(controlled) < 0.2 * np.var(plain)


def test_weighted_risks__equal_weights_give_the_mean() -> None:
    losses = torch.tensor([0.0, 1.0, 5.0], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    assert dev_risk(ones, losses) == importance_weighted_risk(ones, losses) == 2
    assert dev_risk(ones[:1], losses[1:2]) == 1
    weights = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    assert importance_weighted_risk(weights, losses) == 0.75
    assert importance_weighted_risk(weights * 1e-9, losses) == pytest.approx(0.75)
    assert effective_count(ones) == 3
    assert effective_count(weights) == pytest.approx(1.6)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_partners__each_image_once_never_itself(count: int) -> None:
    found = partners(count, seed=1)
    assert sorted(found.tolist()) == list(range(count))
    assert not (found == torch.arange(count)).any()
    assert partners(1).tolist() == [0]
    if count == 50:
        assert not torch.equal(found, partners(count, seed=2))


def test_mix_consistency__counts_by_hand() -> None:
    answers, partner = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 3, 0])
    found = mix_consistency(answers, partner, torch.tensor([0, 1, 1, 2]))
    assert found == Consistency(intra=1.0, inter=2 / 3, intra_count=1, inter_count=3)
    one = torch.zeros(4, dtype=torch.long)
    assert mix_consistency(one, partner, one) == Consistency(1.0, None, 4, 0)
    assert mix_consistency(torch.arange(4), partner, torch.arange(4)).intra is None
    with pytest.raises(DomainError, match="4 answers, 4 partners"):
        mix_consistency(answers, partner, answers[:3])


def test_mix__prevails_by_the_papers_share() -> None:
    assert SHARE == 0.55
    assert mix(torch.tensor([1.0]), torch.tensor([0.0])).item() == pytest.approx(0.55)


# -- a candidate -----------------------------------------------------------------------------------------


def test_judge__gathers_every_score() -> None:
    random = np.random.default_rng(4)
    labels = np.arange(40) % 3
    held_out = np.eye(3)[labels] * 3 + random.normal(size=(40, 3))
    features = random.normal(size=(60, 4)), random.normal(size=(40, 4)), random.normal(size=(50, 4)) + 0.5
    answers = logits(50, 3, seed=1)
    found = judge(
        "one",
        answers,
        target_features=features[2],
        source=SourceEvidence(features[0], features[1], held_out, labels),
        mixed=Consistency(0.9, 0.4, 10, 40),
    )
    weights = importance_weights(features[0], features[2], features[1])
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(held_out), torch.from_numpy(labels), reduction="none"
    )
    wrong = held_out.argmax(1) != labels
    assert found.scores == {
        "entropy": mean_entropy(answers),
        "snd": soft_neighbourhood_density(answers),
        "im": information_maximisation(answers),
        "bnm": nuclear_norm(answers),
        "dev": dev_risk(weights, losses),
        "iw": pytest.approx((weights.numpy() * wrong).sum() / weights.numpy().sum()),
        "mixval_intra": 0.9,
        "mixval_inter": 0.4,
    }
    assert found.answers.source_accuracy == pytest.approx(1 - wrong.mean())
    assert set(judge("two", answers).scores) == set(SCORERS)
    assert judge("two", answers).scores["dev"] is None
    assert judge("two", answers).answers.source_accuracy is None
