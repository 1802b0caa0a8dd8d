"""The choice among candidates: scorers combined by rank, never below source-only, never a collapse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tldist.errors import RecipeError, close_matches
from tldist.features.ranks import complete_scores, mean_ranks
from tldist.features.scorers.candidate import SCORERS, Candidate
from tldist.features.scorers.guard import why_collapsed

SOURCE_ONLY = "source_only"


@dataclass(frozen=True)
class Place:
    """One candidate in the order.

    Attributes:
        name: of the candidate.
        mean_rank: of its places under the scorers, 1 is the best there can be; None: it was refused before.
        chosen: whether it is the one.
        reason: why it was chosen, or why not.
        scores: its values by scorer.
        answers: what the guard saw, as plain data.
    """

    name: str
    mean_rank: float | None
    chosen: bool
    reason: str
    scores: dict[str, float | None]
    answers: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))


@dataclass(frozen=True)
class Choice:
    """The chosen candidate and the way to it.

    Attributes:
        chosen: its name.
        ranking: all candidates, the best first, refused ones last.
        scorers: that counted.
        left_out: by scorer that did not count, why.
    """

    chosen: str
    ranking: tuple[Place, ...]
    scorers: tuple[str, ...]
    left_out: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "chosen": self.chosen,
            "ranking": [place.to_dict() for place in self.ranking],
            "scorers": list(self.scorers),
            "left_out": dict(self.left_out),
        }


def choose(
    candidates: Sequence[Candidate],
    *,
    baseline: str = SOURCE_ONLY,
    prior: Tensor | None = None,
    scorers: Sequence[str] = tuple(SCORERS),
) -> Choice:
    """Choose a candidate without target labels.

    Candidates that have collapsed are refused first (`tldist.features.scorers.guard`): most scorers like
    nothing better. The others are placed by each scorer that all of them have, and ordered by the mean of
    their places. A candidate is chosen only if its mean place is better than source-only's and more scorers
    prefer it to source-only than the other way round; so adding candidates cannot lift a worse one above it.

    Args:
        candidates: with the baseline among them, all judged on the same target images.
        baseline: the name of the one that was trained on the source alone.
        prior: float64 (K,), the classes' shares among the source images; None: even.
        scorers: keys of `SCORERS` that may count.

    Raises:
        RecipeError: no baseline among the candidates, a name twice, or an unknown scorer.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    _check(candidates, by_name, baseline, scorers)
    refused = {
        name: reason
        for name, candidate in by_name.items()
        if name != baseline
        and (reason := why_collapsed(candidate.answers, by_name[baseline].answers, prior)) is not None
    }
    table = {name: candidate.scores for name, candidate in by_name.items() if name not in refused}
    kept, left_out = complete_scores(table, scorers)
    signed = {
        scorer: {name: value if SCORERS[scorer].larger else -value for name, value in values.items()}
        for scorer, values in kept.items()
    }
    weights = {scorer: SCORERS[scorer].weight for scorer in kept}
    means = mean_ranks(signed, weights) if kept else {baseline: 1.0}
    # Of equal ones the baseline is first: what is no better is not worth the change.
    order = sorted(means, key=lambda name: (means[name], name != baseline))
    reasons = {name: _why_not(name, baseline, means, signed, weights) for name in order}
    chosen = next((name for name in order if reasons[name] is None), baseline)
    refused |= {name: "no scorer has a value of it" for name in table if name not in means}

    def place(name: str) -> Place:
        why = refused.get(name) or _words(name, chosen, baseline, reasons.get(name), len(kept))
        candidate = by_name[name]
        return Place(
            name, means.get(name), name == chosen, why, dict(candidate.scores), candidate.answers.to_dict()
        )

    return Choice(chosen, tuple(place(name) for name in [*order, *refused]), tuple(kept), left_out)


def _why_not(
    name: str,
    baseline: str,
    means: Mapping[str, float],
    signed: Mapping[str, Mapping[str, float]],
    weights: Mapping[str, float],
) -> str | None:
    """Why a candidate is not to be preferred to the baseline; None: it is (or it is the baseline)."""
    if name == baseline:
        return None
    if means[name] >= means[baseline]:
        return f"no better than {baseline}: mean rank {means[name]:.2f}, {baseline} has {means[baseline]:.2f}"
    votes = sum(
        weights[scorer] * ((values[name] > values[baseline]) - (values[name] < values[baseline]))
        for scorer, values in signed.items()
    )
    if votes <= 0:
        return f"not more scorers prefer it to {baseline} than the other way round"
    return None


def _words(name: str, chosen: str, baseline: str, reason: str | None, scorers: int) -> str:
    if reason is not None:
        return reason
    if name != chosen:
        return f"{chosen} has a better mean rank" if name != baseline else f"{chosen} is preferred"
    if not scorers:
        return "no scorer could compare the candidates"
    return f"the best mean rank of {scorers} scorers"


def _check(
    candidates: Sequence[Candidate],
    by_name: Mapping[str, Candidate],
    baseline: str,
    scorers: Sequence[str],
) -> None:
    if len(by_name) < len(candidates):
        raise RecipeError(f"two candidates have one name among {[c.name for c in candidates]}.")
    if baseline not in by_name:
        raise RecipeError(
            f"'{baseline}' is not among the candidates ({', '.join(by_name)}): without it a model that is "
            f"worse than no adaptation at all could be chosen."
        )
    for scorer in scorers:
        if scorer not in SCORERS:
            raise RecipeError(f"scorer '{scorer}': unknown. {close_matches(scorer, SCORERS)}")
    lengths = {len(candidate.answers.predictions) for candidate in candidates}
    if len(lengths) > 1:
        raise RecipeError(f"the candidates were judged on other numbers of images: {sorted(lengths)}.")
