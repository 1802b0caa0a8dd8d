"""The choice without target labels: the order, the guard, and source-only."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tldist.errors import RecipeError
from tldist.features.scorers.candidate import SCORERS, Candidate, judge
from tldist.features.scorers.choose import choose
from tldist.features.scorers.guard import Answers, agreement, why_collapsed

CLASSES, COUNT = 5, 1000
LABELS = np.arange(COUNT) % CLASSES


def answers(right: float, sure: float = 4.0, seed: int = 0, source: float | None = 0.9) -> Answers:
    return Answers.of(answer_logits(right, sure, seed), source)


def answer_logits(right: float, sure: float = 4.0, seed: int = 0) -> np.ndarray:
    """Logits of a model that is right so often and so sure."""
    random = np.random.default_rng(seed)
    said = np.where(random.random(COUNT) < right, LABELS, random.integers(0, CLASSES, COUNT))
    return np.eye(CLASSES)[said] * sure + random.normal(size=(COUNT, CLASSES)) * 0.1


def candidate(name: str, right: float = 0.8, sure: float = 4.0, **scores: float) -> Candidate:
    made = judge(name, answer_logits(right, sure, seed=len(name)))
    return replace(made, scores={**dict.fromkeys(SCORERS), **(scores or made.scores)})


# -- the guard ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("right", [1.0, 0.9, 0.6, 0.4])
def test_guard__lets_honest_models_pass(right: float) -> None:
    assert why_collapsed(answers(right, seed=1), answers(0.5, seed=2)) is None
    assert why_collapsed(answers(right, seed=1), answers(right, seed=1)) is None


@pytest.mark.parametrize(("kept", "caught"), [(1, True), (2, True), (3, True), (5, False)])
def test_guard__catches_answers_that_share_few_classes(kept: int, caught: bool) -> None:
    logits = answer_logits(1.0)
    logits[:, kept:] -= 50
    why = why_collapsed(Answers.of(logits), answers(0.7, seed=3))
    assert (why is not None) == caught
    if caught:
        assert "collapsed: answers as varied as" in str(why)


def test_guard__catches_a_single_class_that_is_lost() -> None:
    logits = answer_logits(1.0)
    logits[:, 4] -= 50
    assert why_collapsed(Answers.of(logits), answers(0.9, seed=3)) == (
        "collapsed: hardly any image is of class 4 any more"
    )


def test_guard__a_target_that_has_fewer_classes_is_no_collapse() -> None:
    few = answer_logits(1.0)[LABELS < 2]
    source_only = answer_logits(0.9, seed=2)[LABELS < 2]
    assert why_collapsed(Answers.of(few), Answers.of(source_only)) is None
    prior = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025], dtype=torch.float64)
    rare = np.random.default_rng(0).choice(5, COUNT, p=prior.numpy())
    said = np.eye(5)[rare] * 4
    assert why_collapsed(Answers.of(said), Answers.of(said), prior) is None
    noisy = Answers.of(answer_logits(0.2))  # source-only is lost: it names all classes alike
    assert "collapsed" in str(why_collapsed(Answers.of(said), noisy))
    assert "varied" not in str(why_collapsed(Answers.of(said), noisy, prior))


def test_guard__catches_classes_that_swapped_places() -> None:
    swapped = Answers.of(np.roll(answer_logits(1.0), 1, axis=1))
    assert swapped.effective_classes == pytest.approx(5, abs=0.01)
    assert "hardly more than by chance (kappa -0." in str(why_collapsed(swapped, answers(0.8, seed=1)))


def test_guard__catches_a_forgotten_source() -> None:
    source_only = answers(0.8, seed=1, source=0.96)
    assert "held-out source images is 0.700, where source-only has 0.960" in str(
        why_collapsed(answers(0.9, source=0.70), source_only)
    )
    assert why_collapsed(answers(0.9, source=0.73), source_only) is None
    assert why_collapsed(answers(0.9, source=None), source_only) is None


def test_answers__unsure_models_are_as_varied_as_their_hard_answers() -> None:
    logits = np.zeros((100, 5))
    logits[:, 0] = 0.01  # nearly even, yet the answer is always the same
    assert Answers.of(logits).effective_classes == pytest.approx(1)


@pytest.mark.parametrize("seed", range(3))
def test_agreement__is_cohens_kappa(seed: int) -> None:
    from sklearn.metrics import cohen_kappa_score

    random = np.random.default_rng(seed)
    a = random.integers(0, 4, 60)
    b = np.where(random.random(60) < 0.5, a, random.integers(0, 4, 60))
    found = agreement(torch.from_numpy(a), torch.from_numpy(b), 4)
    assert found == pytest.approx(cohen_kappa_score(a, b), rel=1e-12)
    one = torch.zeros(5, dtype=torch.long)
    assert agreement(one, one, 4) == 1


# -- the choice --------------------------------------------------------------------------------------------


def test_choose__the_best_mean_rank_wins() -> None:
    found = choose(
        [
            candidate("source_only", entropy=0.5, snd=1.0, im=0.5),
            candidate("better", entropy=0.3, snd=2.0, im=0.9),
            candidate("mixed", entropy=0.4, snd=3.0, im=0.6),
        ]
    )
    assert found.chosen == "better"
    assert [place.name for place in found.ranking] == ["better", "mixed", "source_only"]
    assert [place.mean_rank for place in found.ranking] == pytest.approx([4 / 3, 5 / 3, 3])
    assert found.scorers == ("entropy", "snd", "im")
    assert found.ranking[0].reason == "the best mean rank of 3 scorers"
    assert found.ranking[1].reason == "better has a better mean rank"
    assert "dev" in found.left_out
    assert json.loads(json.dumps(found.to_dict()))["chosen"] == "better"


def test_choose__a_collapse_that_all_scorers_like_best_is_refused() -> None:
    collapsed = judge("collapsed", np.tile([50.0, 0, 0, 0, 0], (COUNT, 1)))
    honest = [judge("source_only", answer_logits(0.6, 2.0, 1)), judge("adapted", answer_logits(0.9, 4.0, 2))]
    assert collapsed.scores["entropy"] < min(c.scores["entropy"] for c in honest)  # type: ignore[type-var, operator]
    assert collapsed.scores["snd"] > max(c.scores["snd"] for c in honest)  # type: ignore[type-var, operator]
    found = choose([*honest, collapsed])
    assert found.chosen == "adapted"
    last = found.ranking[-1]
    assert (last.name, last.mean_rank, last.chosen) == ("collapsed", None, False)
    assert last.reason.startswith("collapsed")
    assert choose([honest[0], collapsed]).chosen == "source_only"


def test_choose__refused_candidates_do_not_move_the_others() -> None:
    scores = {"entropy": 0.5, "snd": 2.0, "im": 0.5}
    others = [
        candidate("source_only", **scores),
        candidate("a", entropy=0.3, snd=1.5, im=0.6),
        candidate("b", entropy=0.4, snd=1.8, im=0.7),
    ]
    dead = judge("dead", np.tile([50.0, 0, 0, 0, 0], (COUNT, 1)))
    without, beside = (
        choose(others),
        choose([*others, replace(dead, scores={**dict.fromkeys(SCORERS), **scores})]),
    )
    assert without.ranking == beside.ranking[:-1]


def test_choose__worse_or_equal_to_source_only_is_not_chosen() -> None:
    source_only = candidate("source_only", entropy=0.5, snd=2.0, im=0.5)
    worse = candidate("worse", entropy=0.4, snd=1.0, im=0.4)
    equal = candidate("equal", entropy=0.5, snd=2.0, im=0.5)
    found = choose([worse, equal, source_only])
    assert found.chosen == "source_only"
    by_name = {place.name: place.reason for place in found.ranking}
    assert "no better than source_only: mean rank" in by_name["equal"]
    assert "no better than source_only: mean rank" in by_name["worse"]


def test_choose__a_better_mean_rank_by_the_company_alone_is_not_enough() -> None:
    # by two scorers of three source-only beats "lucky"; the mean rank says otherwise for what lies between
    found = choose(
        [
            candidate("source_only", entropy=0.1, snd=3.0, im=0.1),
            candidate("lucky", entropy=0.2, snd=2.9, im=0.9),
            candidate("between1", entropy=0.3, snd=2.0, im=0.8),
            candidate("between2", entropy=0.4, snd=1.0, im=0.7),
        ]
    )
    assert found.ranking[0].name == "lucky"
    assert "not more scorers prefer it to source_only" in found.ranking[0].reason
    assert found.chosen == "source_only"
    assert {place.name for place in found.ranking if place.chosen} == {"source_only"}


def test_choose__the_next_best_is_taken_where_the_best_loses_to_source_only() -> None:
    names = ("source_only", "lucky", "solid", "x", "y")
    places = [[1, 2, 3, 4, 5], [1, 2, 4, 3, 5], [3, 4, 1, 2, 5], [5, 1, 2, 4, 3], [5, 1, 2, 3, 4]]
    table = {
        name: {
            scorer: float(row[at] if not SCORERS[scorer].larger else -row[at])
            for scorer, row in zip(("entropy", "snd", "im", "bnm", "dev"), places)
        }
        for at, name in enumerate(names)
    }
    found = choose([candidate(name, **scores) for name, scores in table.items()])
    assert [place.name for place in found.ranking[:3]] == ["lucky", "solid", "source_only"]
    assert found.chosen == "solid"
    assert found.ranking[0].reason.startswith("not more scorers prefer it")


def test_choose__nothing_to_compare_by_keeps_source_only() -> None:
    blank = dict.fromkeys(SCORERS)
    found = choose(
        [replace(candidate("source_only"), scores=blank), replace(candidate("other"), scores=blank)]
    )
    assert found.chosen == "source_only"
    assert found.ranking[0].reason == "no scorer could compare the candidates"
    assert found.ranking[1].reason == "no scorer has a value of it"


def test_choose__mixvals_two_share_one_weight() -> None:
    found = choose(
        [
            candidate("source_only", im=0.5, mixval_intra=0.5, mixval_inter=0.5),
            candidate("other", im=0.6, mixval_intra=0.4, mixval_inter=0.4),
        ]
    )
    assert [place.mean_rank for place in found.ranking] == [1.5, 1.5]
    assert found.ranking[0].name == found.chosen == "source_only"


def test_choose__refuses_what_cannot_be_compared() -> None:
    one, other = candidate("source_only"), candidate("other")
    with pytest.raises(RecipeError, match="'source_only' is not among the candidates"):
        choose([other])
    with pytest.raises(RecipeError, match="two candidates have one name"):
        choose([one, one])
    with pytest.raises(RecipeError, match=r"scorer 'entropi': unknown\. Did you mean: entropy"):
        choose([one, other], scorers=["entropi"])
    short = judge("short", answer_logits(0.9)[:10])
    with pytest.raises(RecipeError, match=r"other numbers of images: \[10, 1000\]"):
        choose([one, short])
    assert choose([other, candidate("base")], baseline="base").chosen in ("other", "base")
