"""Backbones ranked by several scores, as a table of plain data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tldist.errors import DomainError
from tldist.features.arrays import Values
from tldist.features.ranks import complete_scores, mean_ranks, ranks
from tldist.features.transferability.hscore import h_score, regularised_h_score
from tldist.features.transferability.leep import leep, nleep
from tldist.features.transferability.logme import logme
from tldist.features.transferability.neighbours import knn_accuracy
from tldist.methods import find_method

Score = Callable[[Values, Values], float]
"""(features or probabilities, labels) to a number; larger is better."""

SCORES: dict[str, Score] = {
    "logme": logme,
    "h_score": h_score,
    "h_score_regularised": regularised_h_score,
    "knn": knn_accuracy,
    "nleep": nleep,
    "leep": leep,
}
"""The family of transferability scores, by the name that ``rank=`` takes."""

READS_PROBABILITIES = frozenset({"leep"})
"""The scores that read the answers of the model's own head; others read its features."""

DEFAULT = ("logme", "h_score_regularised", "knn")


@dataclass(frozen=True)
class Backbone:
    """What a model makes of the labelled images.

    Attributes:
        features: (N, D).
        probabilities: (N, Z), of the classes of its own head; None: it has none.
    """

    features: Values
    probabilities: Values | None = None


@dataclass(frozen=True)
class Row:
    """One backbone in the table.

    Attributes:
        name: of the backbone.
        mean_rank: over the scores that all backbones have; 1 is the best there can be.
        scores: by score; None where it has none.
        ranks: by score, of those that all have.
    """

    name: str
    mean_rank: float
    scores: dict[str, float | None]
    ranks: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "name": self.name,
            "mean_rank": self.mean_rank,
            "scores": dict(self.scores),
            "ranks": dict(self.ranks),
        }


def rank(
    backbones: Mapping[str, Backbone], labels: Values, scores: Sequence[str] = DEFAULT
) -> tuple[list[Row], dict[str, str]]:
    """Rank backbones by the mean of their places under several scores.

    Args:
        backbones: by name, each on the same images in the same order.
        labels: whole numbers (N,), of those images.
        scores: keys of `SCORES`, or ``package.module:function`` that reads features.

    Returns:
        The rows, the best first (equal ones in the order given); by score that some backbone lacks, why it
        does not count.

    Raises:
        RecipeError: an unknown score.
        DomainError: no backbone has all scores, or the labels do not suit.
    """
    functions = {name: find_method(name, SCORES) for name in scores}
    table = {name: _scores_of(backbone, labels, functions) for name, backbone in backbones.items()}
    kept, left_out = complete_scores(table, scores)
    if not kept:
        reasons = "; ".join(f"{score}: {why}" for score, why in left_out.items())
        raise DomainError(f"the backbones have no score in common: {reasons or 'none was asked for'}.")
    means = mean_ranks(kept)
    placed = {score: ranks(values) for score, values in kept.items()}
    rows = [
        Row(name, means[name], table[name], {score: placed[score][name] for score in kept})
        for name in backbones
    ]
    return sorted(rows, key=lambda row: row.mean_rank), left_out


def _scores_of(backbone: Backbone, labels: Values, functions: Mapping[str, Score]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, function in functions.items():
        read = backbone.probabilities if name in READS_PROBABILITIES else backbone.features
        found[name] = None if read is None else function(read, labels)
    return found
