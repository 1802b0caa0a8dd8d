"""The choice without labels: scores, ranks, the guard against collapse, and what happens to equals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tldist.adaptation.choice import (
    SCORERS,
    Evidence,
    answered_classes,
    choose,
    combine_ranks,
    entropy_score,
    information_score,
    why_refused,
)


def evidence(
    target: np.ndarray, source: np.ndarray | None = None, labels: np.ndarray | None = None
) -> Evidence:
    classes = target.shape[1]
    source = np.empty((0, classes)) if source is None else source
    return Evidence(
        source_features=np.zeros((len(source), 2)),
        source_logits=source,
        source_labels=np.empty(0, dtype=np.int64) if labels is None else labels,
        target_features=np.zeros((len(target), 2)),
        target_logits=target,
    )


def one_hot(answers: list[int], classes: int = 4, scale: float = 50.0) -> np.ndarray:
    return scale * np.eye(classes, dtype=np.float32)[answers]


def test_scores__of_known_answers() -> None:
    unsure, diverse, collapsed = np.zeros((8, 4)), one_hot([0, 1, 2, 3] * 2), one_hot([2] * 8)
    assert [entropy_score(evidence(x)) for x in (unsure, diverse, collapsed)] == pytest.approx(
        [-math.log(4), 0, 0], abs=1e-12
    )
    assert [information_score(evidence(x)) for x in (unsure, diverse, collapsed)] == pytest.approx(
        [0, math.log(4), 0], abs=1e-12
    )
    huge = np.array([[1e6, -1e6], [-1e6, 1e6]], dtype=np.float32)
    assert information_score(evidence(huge)) == pytest.approx(math.log(2))


def test_answered_classes__counts_by_entropy() -> None:
    assert answered_classes(one_hot([0, 1, 2, 3])) == pytest.approx(4)
    assert answered_classes(one_hot([1] * 9)) == pytest.approx(1)
    assert answered_classes(one_hot([0, 0, 1, 1])) == pytest.approx(2)


def test_guard__refuses_a_collapse_and_a_loss_of_the_task() -> None:
    labels = np.array([0, 1, 2, 3])
    plain = evidence(one_hot([0, 1, 2, 3] * 4), one_hot([0, 1, 2, 3]), labels)
    assert why_refused(plain, plain) is None
    collapsed = evidence(one_hot([0] * 15 + [1]), one_hot([0, 1, 2, 3]), labels)
    assert "collapsed" in (why_refused(collapsed, plain) or "")
    forgot = evidence(one_hot([0, 1, 2, 3] * 4), one_hot([0, 1, 1, 1]), labels)
    assert "forgot" in (why_refused(forgot, plain) or "")
    broken = one_hot([0, 1, 2, 3] * 4)
    broken[0, 0] = np.inf
    assert "finite" in (why_refused(evidence(broken), plain) or "")


def test_guard__a_target_of_few_classes_is_no_collapse() -> None:
    few = evidence(one_hot([1] * 30 + [2] * 2))
    assert why_refused(few, few) is None


def test_ranks__are_means_and_equal_scores_share_them() -> None:
    scores = {"a": {"x": 1.0, "y": 9.0}, "b": {"x": 2.0, "y": 5.0}, "c": {"x": 2.0, "y": 1.0}}
    assert combine_ranks(scores) == pytest.approx({"a": (3 + 1) / 2, "b": (1.5 + 2) / 2, "c": (1.5 + 3) / 2})


def test_ranks__do_not_care_for_the_scale_of_a_scorer() -> None:
    random = np.random.default_rng(0)
    table = random.normal(size=(5, 3))
    names, scorers = "abcde", "xyz"
    plain = {n: dict(zip(scorers, row)) for n, row in zip(names, table)}
    warped = {
        n: dict(zip(scorers, [math.exp(row[0]), 1e6 * row[1], row[2] ** 3])) for n, row in zip(names, table)
    }
    assert combine_ranks(plain) == pytest.approx(combine_ranks(warped))


def test_ranks__not_a_number_comes_last() -> None:
    ranks = combine_ranks({"a": {"x": math.nan}, "b": {"x": -5.0}, "c": {"x": -math.inf}})
    assert ranks["b"] == 1
    assert ranks["a"] == ranks["c"] == 2.5


def test_choose__of_equals_source_only_then_the_last() -> None:
    same = {"x": 1.0}
    assert choose({"source_only": same, "epoch-1": same}) == "source_only"
    assert choose({"source_only": {"x": 0.0}, "epoch-1": same, "epoch-2": same}) == "epoch-2"


def test_choose__the_refused_are_not_even_ranked() -> None:
    scores = {
        "source_only": {"x": 2.0, "y": 1.0},
        "epoch-1": {"x": 1.0, "y": 2.5},
        "epoch-2": {"x": 9.0, "y": 9.0},
        "epoch-3": {"x": 1.5, "y": 2.4},
    }
    assert choose(scores) == "epoch-2"
    assert choose(scores, ["epoch-2"]) != "epoch-2"
    assert choose(scores, ["epoch-1", "epoch-2", "epoch-3"]) == "source_only"


def test_scorers__a_collapse_that_entropy_loves_is_not_chosen() -> None:
    random = np.random.default_rng(0)
    plain = evidence(2 * one_hot(random.integers(0, 4, 40).tolist(), scale=1) + random.normal(size=(40, 4)))
    collapsed = evidence(one_hot([3] * 40))
    scores = {
        name: {scorer: SCORERS[scorer](seen) for scorer in ("entropy",)}
        for name, seen in (("source_only", plain), ("epoch-1", collapsed))
    }
    refused = ["epoch-1"] if why_refused(collapsed, plain) else []
    assert choose(scores) == "epoch-1"
    assert choose(scores, refused) == "source_only"
