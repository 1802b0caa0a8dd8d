"""The figures and the verdict of a comparison, against plain float64 arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tldist.bundle import Task
from tldist.export.agreement import Agreement
from tldist.export.compare import Meaning
from tldist.export.compare import compare as compare_answers
from tldist.export.decisions import Answers
from tldist.export.groups import SLACK, smallest_cosine
from tldist.export.profile import Tolerances

TOLERANCES = Tolerances(max_relative=1e-4, min_cosine=0.999999, max_flipped=0.0)


def compare(
    output: str,
    expected: np.ndarray,
    found: np.ndarray,
    groups: np.ndarray,
    tolerances: Tolerances,
    *,
    decides: bool = False,
    task: Task = "multiclass",
    embeds: bool = False,
    probable: dict[str, float] | None = None,
    samples: np.ndarray | None = None,
    **others: np.ndarray,
) -> Agreement:
    """Each row a sample of its own, unless it is said otherwise."""
    rows = np.arange(len(groups)) if samples is None else samples
    meaning = Meaning(decides=decides, embeds=embeds, probable=probable, task=task)
    return compare_answers(output, Answers(expected, found, groups, rows, **others), tolerances, meaning)


def answers(rows: int = 40, width: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    groups = np.array(["real"] * (rows - 8) + ["noise"] * 8)
    return random.normal(size=(rows, width)).astype(np.float32), groups


@pytest.mark.parametrize("width", [1, 2, 50])
def test_compare__figures_agree_with_float64(width: int) -> None:
    expected, groups = answers(width=width)
    found = expected + np.random.default_rng(1).normal(size=expected.shape, scale=1e-6).astype(np.float32)
    result = compare("logits", expected, found, groups, TOLERANCES, decides=True)
    one, other = expected.astype(float), found.astype(float)
    assert result.max_absolute == np.abs(one - other).max()
    assert result.mean_absolute == pytest.approx(np.abs(one - other).mean(), rel=1e-12)
    real = groups == "real"
    assert result.groups[0].max_relative == np.abs(one - other)[real].max() / np.abs(one[real]).max()
    cosines = [u @ v / np.sqrt(u @ u * (v @ v)) for u, v in zip(one, other)]
    assert smallest_cosine(expected, found) == pytest.approx(min(cosines), abs=1e-12) or width == 1
    assert result.passed
    assert result.top1 == np.mean(one.argmax(1) == other.argmax(1))
    assert len(result.pairs) == min(500, expected.size)


def test_compare__error_on_small_group_is_not_hidden_by_a_large_one() -> None:
    expected, groups = answers()
    expected[groups == "noise"] *= 1e6
    found = expected.copy()
    found[0, 0] += 0.001  # too little for the cosine to see
    result = compare("logits", expected, found, groups, TOLERANCES)
    assert not result.passed
    assert result.worst is not None
    assert result.worst.name == "real"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["expected", "found", "both"])
def test_compare__not_finite_always_fails(bad: float, where: str) -> None:
    expected, groups = answers()
    found = expected.copy()
    if where != "found":
        expected[3, 2] = bad
    if where != "expected":
        found[3, 2] = bad
    lax = Tolerances(max_relative=1.0, min_cosine=1e-9, max_flipped=1.0)
    result = compare("logits", expected, found, groups, lax, referee=expected.astype(float), decides=True)
    assert not result.passed
    assert "NaN" in result.faults[0]
    json.dumps(result.to_dict(), allow_nan=False)


def test_compare__other_shape_fails() -> None:
    expected, groups = answers()
    assert not compare("logits", expected, expected[:, :-1], groups, TOLERANCES).passed


def test_compare__referee_widens_to_a_multiple_of_own_error() -> None:
    expected, groups = answers()
    referee = expected.astype(float)
    referee[0] += 1e-4 * np.abs(referee[groups == "real"]).max()
    found = expected.copy()
    found[1] += 4e-4 * np.abs(expected[groups == "real"]).max()
    strict = compare("features", expected, found, groups, TOLERANCES)
    assert any("relative error" in fault for fault in strict.faults)
    refereed = compare("features", expected, found, groups, TOLERANCES, referee=referee)
    assert refereed.groups[0].widened
    assert refereed.groups[0].tolerance == pytest.approx(SLACK * 1e-4, rel=1e-3)
    assert not refereed.groups[1].widened  # the referee agrees on noise: nothing is forgiven there
    assert not any("relative error" in fault for fault in refereed.faults)


def test_compare__model_that_disagrees_with_itself_proves_nothing() -> None:
    expected, groups = answers()
    referee = expected.astype(float) * 1.05
    result = compare("features", expected, expected, groups, TOLERANCES, referee=referee)
    assert "ill-conditioned" in result.faults[0]


def test_compare__chaos_on_noise_alone_is_a_warning() -> None:
    expected, groups = answers()
    referee = expected.astype(float)
    referee[groups == "noise"] *= 1.2
    found = expected.copy()
    found[groups == "noise"] *= 1.1
    result = compare("features", expected, found, groups, TOLERANCES, referee=referee)
    assert result.passed
    assert "noise" in result.warnings[0]


def test_compare__flip_fails_with_its_margin() -> None:
    expected, groups = answers(width=3)
    expected[5] = [1.0, 1.0 + 1e-5, 0.0]
    found = expected.copy()
    found[5] = [1.0 + 2e-5, 1.0, 0.0]
    result = compare("logits", expected, found, groups, TOLERANCES, decides=True)
    assert [(flip.sample, flip.expected, flip.found) for flip in result.flips] == [(5, 1, 0)]
    magnitude = np.abs(expected[groups == "real"]).max()
    assert result.flips[0].margin == pytest.approx(1e-5 / magnitude, rel=0.05)
    assert not result.passed
    allowed = Tolerances(max_relative=1e-4, min_cosine=0.999999, max_flipped=0.03)
    assert compare("logits", expected, found, groups, allowed, decides=True).passed


def test_compare__tie_is_no_decision() -> None:
    expected, groups = answers(width=3)
    expected[5] = [1.0, 1.0, 0.0]
    found = expected.copy()
    found[5] = [1.0, 1.0 + 1e-7, 0.0]
    result = compare("logits", expected, found, groups, TOLERANCES, decides=True)
    assert result.passed
    assert not result.flips


def test_compare__permuted_columns_fail() -> None:
    expected, groups = answers()
    assert not compare("features", expected, expected[:, ::-1], groups, TOLERANCES).passed


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_compare__constant_outputs_are_called_vacuous(constant: float) -> None:
    expected, groups = answers()
    expected[:] = constant
    result = compare(
        "logits", expected, expected, groups, TOLERANCES, referee=expected.astype(float), decides=True
    )
    assert "hardly depend" in result.warnings[0]


def test_compare__a_sample_counts_once_whatever_the_batch_sizes() -> None:
    expected, groups = answers(rows=10, width=3)
    samples = np.concatenate([np.arange(10), np.arange(10), [4]])
    expected, groups = expected[samples], groups[samples]
    found = expected.copy()
    for row in (4, 14, 20):  # sample 4 each time
        found[row] = -expected[row]
    lax = Tolerances(max_relative=1.0, min_cosine=1e-9, max_flipped=0.1, max_mean=1.0)
    result = compare("logits", expected, found, groups, lax, decides=True, samples=samples)
    assert [flip.sample for flip in result.flips] == [4]
    assert result.flipped == pytest.approx(0.1)
    assert result.top1 == pytest.approx(0.9)
    assert not any("flipped" in fault for fault in result.faults)
    strict = Tolerances(max_relative=1.0, min_cosine=1e-9, max_flipped=0.09, max_mean=1.0)
    result = compare("logits", expected, found, groups, strict, decides=True, samples=samples)
    assert any("1 of 10 decisions flipped" in fault for fault in result.faults)


def test_compare__extremes_are_reported_where_the_profile_says_so() -> None:
    expected, groups = answers(width=3)
    found = expected.copy()
    found[groups == "noise"] = -expected[groups == "noise"]
    held = compare("logits", expected, found, groups, TOLERANCES, decides=True)
    assert any("noise" in fault for fault in held.faults)
    reported = TOLERANCES.model_copy(update={"extremes": "reported"})
    result = compare("logits", expected, found, groups, reported, decides=True)
    assert result.passed
    assert result.top1 == 1.0
    assert {part.name: part.judged for part in result.groups} == {"real": True, "noise": False}
    assert result.groups[1].max_relative > 1  # and it is in the report
    assert len(result.flips) == 8
    found[-1, 0] = np.inf
    assert not compare("logits", expected, found, groups, reported, decides=True).passed
    found = expected.copy()
    found[0, 0] += 0.01
    assert not compare("logits", expected, found, groups, reported, decides=True).passed


def test_compare__mean_error_has_a_tolerance_of_its_own() -> None:
    expected, groups = answers()
    found = expected + np.float32(0.02)
    loose = {"max_relative": 0.2, "min_cosine": 0.5, "max_flipped": 1.0, "extremes": "reported"}
    assert compare("x", expected, found, groups, Tolerances(**loose)).passed
    magnitude = np.abs(expected[groups == "real"]).max()
    mean = float(np.abs(found.astype(float) - expected)[groups == "real"].mean() / magnitude)
    for allowed, passes in ((mean * 1.01, True), (mean * 0.99, False)):
        result = compare("x", expected, found, groups, Tolerances(**loose, max_mean=allowed))
        assert result.passed == passes
        assert result.groups[0].mean_relative == pytest.approx(mean)


def test_compare__near_tie_is_no_decision_where_the_profile_says_so() -> None:
    expected, groups = answers(width=3)
    magnitude = np.abs(expected[groups == "real"]).max()
    expected[5] = [1.0, 1.0 + 0.001 * magnitude, 0.0]
    found = expected.copy()
    found[5] = [1.0 + 0.002 * magnitude, 1.0, 0.0]
    half = {"max_relative": 0.01, "min_cosine": 0.999, "max_flipped": 0.0}
    assert not compare("logits", expected, found, groups, Tolerances(**half), decides=True).passed
    tolerant = compare("logits", expected, found, groups, Tolerances(**half, tie_margin=0.0011), decides=True)
    assert tolerant.passed
    assert tolerant.top1 is not None
    assert tolerant.top1 < 1  # a figure is a figure


def test_compare__multilabel_decides_each_class_at_zero() -> None:
    expected, groups = answers(rows=20, width=4)
    expected[3] = [0.5, 2.0, -1.0, -0.4]
    found = expected.copy()
    found[3] = [-0.5, 2.0, -1.0, 0.4]  # the largest logit stays the largest
    lax = {"max_relative": 1.0, "min_cosine": 1e-9}
    result = compare(
        "logits",
        expected,
        found,
        groups,
        Tolerances(**lax, max_flipped=2 / 80),
        decides=True,
        task="multilabel",
    )
    assert [(flip.sample, flip.label, flip.expected, flip.found) for flip in result.flips] == [
        (3, 0, 1, 0),
        (3, 3, 0, 1),
    ]
    assert result.passed
    assert result.top1 == pytest.approx(1 - 2 / 80)
    magnitude = np.abs(expected[groups == "real"]).max()
    assert result.flips[0].margin == pytest.approx(0.5 / magnitude)
    few = Tolerances(**lax, max_flipped=1 / 80)
    assert not compare("logits", expected, found, groups, few, decides=True, task="multilabel").passed
    assert compare("logits", expected, found, groups, few, decides=True).passed
    one = compare("logits", expected[:, :1], found[:, :1], groups, few, decides=True, task="multilabel")
    assert [(flip.label, flip.expected, flip.found) for flip in one.flips] == [(0, 1, 0)]


def test_compare__flip_that_was_known_does_not_fail_again_and_a_new_one_does() -> None:
    expected, groups = answers(width=3)
    exported = expected.copy()
    exported[5] = -expected[5]
    lax = Tolerances(max_relative=1.0, min_cosine=1e-9, max_flipped=0.0)
    same = compare("logits", expected, exported, groups, lax, decides=True, exported=exported)
    assert [flip.known for flip in same.flips] == [True]
    assert same.flipped == 0
    assert not any("flipped" in fault for fault in same.faults)
    found = exported.copy()
    found[6] = -expected[6]
    worse = compare("logits", expected, found, groups, lax, decides=True, exported=exported)
    assert {flip.sample: flip.known for flip in worse.flips} == {5: True, 6: False}
    assert any("1 of 40 decisions flipped" in fault for fault in worse.faults)


def test_compare__drift_from_what_the_package_answered_where_it_was_made() -> None:
    expected, groups = answers()
    magnitude = np.abs(expected[groups == "real"]).max()
    exported = expected + np.float32(0.05)  # as far as int8 is
    found = exported.copy()
    found[2, 1] += np.float32(0.02)
    int8 = {"max_relative": 0.2, "min_cosine": 0.5, "max_flipped": 1.0}
    drift = float(abs(found[2, 1] - exported[2, 1]) / magnitude)
    for allowed, passes in ((drift * 1.01, True), (drift * 0.99, False), (None, True)):
        result = compare(
            "x", expected, found, groups, Tolerances(**int8, max_drift=allowed), exported=exported
        )
        assert result.groups[0].drift == pytest.approx(drift)
        assert result.passed == passes
        if not passes:
            assert "otherwise here than where it was made" in result.faults[0]


def test_compare__neighbours_are_those_that_brute_force_finds() -> None:
    random = np.random.default_rng(3)
    expected = random.normal(size=(30, 6)).astype(np.float32)
    found = (expected + random.normal(size=expected.shape, scale=0.3)).astype(np.float32)
    groups = np.array(["real"] * 26 + ["noise"] * 4)

    def nearest(vectors: np.ndarray, row: int) -> set[int]:
        cosine = [
            u @ vectors[row] / np.sqrt((u @ u) * (vectors[row] @ vectors[row]))
            for u in vectors[:26].astype(float)
        ]
        cosine[row] = -2
        return set(np.argsort(cosine)[-10:].tolist())

    share = np.mean([len(nearest(expected, row) & nearest(found, row)) / 10 for row in range(26)])
    assert 0.5 < share < 1
    lax = {"max_relative": 1.0, "min_cosine": 1e-9, "max_flipped": 1.0}
    result = compare(
        "features", expected, found, groups, Tolerances(**lax, min_neighbours=share - 0.01), embeds=True
    )
    assert (result.neighbours, result.k, result.passed) == (pytest.approx(share), 10, True)
    strict = Tolerances(**lax, min_neighbours=share + 0.01)
    result = compare("features", expected, found, groups, strict, embeds=True)
    assert "nearest neighbours" in result.faults[0]
    assert compare("logits", expected, found, groups, strict).passed


def test_compare__too_few_pictures_for_neighbours_is_said_where_they_matter() -> None:
    expected, groups = answers(rows=28)  # 20 pictures
    asked = TOLERANCES.model_copy(update={"min_neighbours": 0.9})
    result = compare("features", expected, expected, groups, asked, embeds=True)
    assert (result.neighbours, result.passed) == (None, True)
    assert "too few pictures (21" in result.warnings[0]
    assert not compare("features", expected, expected, groups, TOLERANCES, embeds=True).warnings


def test_compare__probabilities_are_absolute_and_add_up() -> None:
    logits, groups = answers(width=5)
    powers = np.exp(logits)
    expected = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    found = expected.copy()
    found[0, 0] += 9e-5
    result = compare("probabilities", expected, found, groups, TOLERANCES, probable={})
    assert result.groups[0].magnitude == 1
    assert result.passed
    found[0, 0] += 9e-5
    assert not compare("probabilities", expected, found, groups, TOLERANCES, probable={}).passed
    wider = compare("probabilities", expected, found, groups, TOLERANCES, probable={"real": 2e-4})
    assert wider.passed
    assert wider.groups[0].source == "logits"
    for wrong, words in ((expected * 0.9, "add up to 0.9"), (expected - 0.2, "lie between")):
        fault = compare("probabilities", expected, wrong, groups, TOLERANCES, probable={}).faults[0]
        assert words in fault
    half = expected * 0.9
    assert "add up" not in str(
        compare("probabilities", expected, half, groups, TOLERANCES, probable={}, task="multilabel").faults
    )


def test_compare__another_resize_is_allowed_what_it_does_to_pytorch() -> None:
    expected, groups = answers()
    magnitude = np.abs(expected[groups == "real"]).max()
    fitted = expected.copy()
    fitted[0, 0] += np.float32(0.001 * magnitude)
    found = expected.copy()
    found[1, 0] += np.float32(0.0009 * magnitude)
    assert not compare("x", expected, found, groups, TOLERANCES).passed
    result = compare("x", expected, found, groups, TOLERANCES, fitted=fitted)
    assert result.groups[0].source == "resize"
    assert not any("relative" in fault for fault in result.faults)
    found[1, 0] += np.float32(0.0002 * magnitude)
    assert not compare("x", expected, found, groups, TOLERANCES, fitted=fitted).passed
