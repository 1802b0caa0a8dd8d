"""Several scores of the same candidates made one order: the mean of their ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import rankdata


def ranks(values: Mapping[str, float]) -> dict[str, float]:
    """The place of each candidate from 1, the largest value first; equal ones share their mean place."""
    places = rankdata([-value for value in values.values()])
    return dict(zip(values, places.tolist()))


def mean_ranks(
    scores: Mapping[str, Mapping[str, float]], weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The weighted mean of each candidate's places over several scores.

    Args:
        scores: by score, its values by candidate; larger is better. All have the same candidates.
        weights: of the scores; None: all the same.

    Returns:
        By candidate, in the order of the first score's candidates; 1 is the best there can be.
    """
    placed = {score: ranks(values) for score, values in scores.items()}
    weight = [1.0 if weights is None else weights[score] for score in scores]
    names = next(iter(scores.values())) if scores else {}
    return {
        name: float(np.average([placed[score][name] for score in scores], weights=weight)) for name in names
    }


def complete_scores(
    table: Mapping[str, Mapping[str, float | None]], wanted: Sequence[str]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The scores that all candidates have, and why others cannot be compared.

    Args:
        table: by candidate, its values by score; None or NaN: it has none.
        wanted: the scores to look for.

    Returns:
        Values by score and candidate; by score that is left out, the reason as a clause.
    """
    kept: dict[str, dict[str, float]] = {}
    left_out: dict[str, str] = {}
    for score in wanted:
        values = {name: row.get(score) for name, row in table.items()}
        numbers = {n: float(v) for n, v in values.items() if v is not None and not math.isnan(v)}
        if len(numbers) == len(values):
            kept[score] = numbers
        else:
            missing = [name for name in values if name not in numbers]
            left_out[score] = f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value"
    return kept, left_out
