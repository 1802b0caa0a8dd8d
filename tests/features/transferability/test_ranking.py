"""Backbones in the order of several scores."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tldist.errors import DomainError, RecipeError
from tldist.features.ranks import complete_scores, mean_ranks, ranks
from tldist.features.transferability.logme import logme
from tldist.features.transferability.ranking import DEFAULT, SCORES, Backbone, rank

LABELS = np.arange(90) % 3


def backbone(spread: float, width: int = 6, head: bool = True) -> Backbone:
    random = np.random.default_rng(int(10 * spread) + width)
    values = random.normal(size=(3, width))[LABELS] * spread + random.normal(size=(90, width))
    return Backbone(values, random.dirichlet(np.ones(4), 90) if head else None)


def test_rank__puts_the_backbone_first_whose_classes_are_apart() -> None:
    rows, left_out = rank({"weak": backbone(0.2), "best": backbone(3, 12), "good": backbone(1)}, LABELS)
    assert [row.name for row in rows] == ["best", "good", "weak"]
    assert [row.mean_rank for row in rows] == [1, 2, 3]
    assert left_out == {}
    assert rows[0].scores["logme"] == logme(backbone(3, 12).features, LABELS)
    assert json.loads(json.dumps(rows[0].to_dict()))["ranks"] == dict.fromkeys(DEFAULT, 1.0)


def test_rank__a_score_that_one_backbone_lacks_does_not_count() -> None:
    backbones = {"headless": backbone(1, head=False), "whole": backbone(3)}
    rows, left_out = rank(backbones, LABELS, ["leep", "knn"])
    assert left_out == {"leep": "headless has no value"}
    assert rows[0].scores["leep"] is not None
    assert rows[1].scores["leep"] is None
    assert set(rows[0].ranks) == {"knn"}
    with pytest.raises(DomainError, match="no score in common: leep: headless has no value"):
        rank(backbones, LABELS, ["leep"])


def test_rank__every_score_of_the_family_runs_and_wrong_names_are_refused() -> None:
    rows, _ = rank({"one": backbone(1)}, LABELS, list(SCORES))
    assert all(value is not None for value in rows[0].scores.values())
    with pytest.raises(RecipeError, match="Did you mean: logme"):
        rank({"one": backbone(1)}, LABELS, ["logm"])


def test_ranks__equal_values_share_their_place() -> None:
    assert ranks({"a": 1.0, "b": 5.0, "c": 5.0, "d": -1.0}) == {"b": 1.5, "c": 1.5, "a": 3, "d": 4}


def test_mean_ranks__by_weight() -> None:
    scores = {"x": {"a": 2.0, "b": 1.0}, "y": {"a": 0.0, "b": 9.0}}
    assert mean_ranks(scores) == {"a": 1.5, "b": 1.5}
    assert mean_ranks(scores, {"x": 3, "y": 1}) == {"a": 1.25, "b": 1.75}


def test_complete_scores__nan_is_no_value() -> None:
    kept, left_out = complete_scores({"a": {"x": 1.0}, "b": {"x": float("nan")}, "c": {}}, ["x"])
    assert kept == {}
    assert left_out == {"x": "b, c have no value"}
