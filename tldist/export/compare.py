"""How far a package's outputs are from PyTorch's, and whether that is near enough. NumPy alone.

Axes: M comparisons (samples times batch sizes), D values of an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tldist.bundle import Task
from tldist.export.agreement import Agreement, GroupAgreement
from tldist.export.decisions import Answers, decide, find_flips
from tldist.export.faults import decision_faults, find_warnings, group_faults, neighbour_faults
from tldist.export.groups import compare_group
from tldist.export.neighbours import neighbours_of, shared_neighbours
from tldist.export.profile import Tolerances

FLOOR = 1e-6
"""A group of samples whose outputs are smaller than this share of all others' is held to that share."""
SCATTER = 500
"""Most pairs of values that are kept for the report."""


@dataclass(frozen=True)
class Meaning:
    """What an output is, so that what matters about it is compared.

    Attributes:
        decides: its largest value, or the sign of each, is a decision.
        embeds: it is a vector that neighbours are searched by.
        probable: it is probabilities: for each group of samples, what the tolerance of the logits lets
            them be off by; None for other outputs.
        task: how logits decide, and whether probabilities add up to 1.
    """

    decides: bool = False
    embeds: bool = False
    probable: Mapping[str, float] | None = None
    task: Task = "multiclass"


def compare(
    output: str, answers: Answers, tolerances: Tolerances, meaning: Meaning | None = None
) -> Agreement:
    """Compare one output.

    Args:
        output: its name.
        answers: to compare.
        tolerances: of the profile.
        meaning: what the output is; None: numbers.
    """
    meaning = meaning or Meaning()
    expected, found = answers.expected, answers.found
    if fault := _incomparable(expected, found) or _improbable(found, meaning):
        return Agreement(output, len(found), faults=(fault,))
    parts = _compare_groups(answers, tolerances, meaning)
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    spread = float(np.ptp(expected, axis=0).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))
    decided, faults = _compare_decisions(answers, parts, tolerances, meaning)
    k, neighbours = _compare_neighbours(answers, parts[0].name) if meaning.embeds else (None, None)
    few = meaning.embeds and k is None
    return Agreement(
        output=output,
        rows=len(expected),
        groups=parts,
        max_absolute=float(error.max()),
        mean_absolute=float(error.mean()),
        spread=spread,
        neighbours=neighbours,
        k=k,
        faults=(
            *group_faults(parts),
            *faults,
            *neighbour_faults(k, neighbours, tolerances.min_neighbours),
        ),
        warnings=tuple(find_warnings(parts, spread, tolerances, few=few)),
        pairs=_pairs(expected, found),
        **decided,
    )


def _incomparable(expected: np.ndarray, found: np.ndarray) -> str:
    """Why two matrices cannot be compared, which always fails; empty where they can."""
    if expected.shape != found.shape:
        return f"PyTorch gives {expected.shape}, the package {found.shape}"
    if not np.isfinite(expected).all():
        return "PyTorch's own output is NaN or infinite"
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).any(1).sum())
        return f"the package's output is NaN or infinite on {bad} of {len(found)} rows"
    return ""


def _improbable(found: np.ndarray, meaning: Meaning) -> str:
    """Why values are no probabilities, with room for half precision; empty where they are, or need not be."""
    if meaning.probable is None:
        return ""
    if found.min() < -1e-2 or found.max() > 1 + 1e-2:
        return f"probabilities lie between {found.min():.3g} and {found.max():.3g}"
    sums = found.astype(np.float64).sum(1)
    if meaning.task == "multiclass" and np.abs(sums - 1).max() > 1e-2:
        return f"the probabilities of a sample add up to {sums[np.abs(sums - 1).argmax()]:.3g}"
    return ""


def _compare_groups(answers: Answers, tolerances: Tolerances, meaning: Meaning) -> tuple[GroupAgreement, ...]:
    least = max(FLOOR * float(np.abs(answers.expected).max()), float(np.finfo(np.float32).tiny))
    parts = []
    for name in dict.fromkeys(answers.groups.tolist()):
        rows = answers.groups == name
        part = compare_group(
            str(name),
            answers.expected[rows],
            answers.found[rows],
            tolerances,
            least=least,
            referee=None if answers.referee is None else answers.referee[rows],
            exported=None if answers.exported is None else answers.exported[rows],
            fitted=None if answers.fitted is None else answers.fitted[rows],
            probable=None if meaning.probable is None else meaning.probable.get(str(name), 0.0),
        )
        parts.append(part)
    return tuple(parts)


def _compare_decisions(
    answers: Answers, parts: tuple[GroupAgreement, ...], tolerances: Tolerances, meaning: Meaning
) -> tuple[dict[str, Any], list[str]]:
    """The figures about decisions, and what is wrong with them; nothing where the output decides nothing."""
    if not meaning.decides:
        return {}, []
    groups = {part.name: part for part in parts}
    counted = np.isin(answers.groups, [part.name for part in parts if part.counts])
    before, after = (decide(logits, meaning.task) for logits in (answers.expected, answers.found))
    flips = find_flips(answers, meaning.task, groups)
    total = max(1, len(np.unique(answers.samples[counted])) * before.shape[1])
    new = [flip for flip in flips if groups[flip.group].counts and not flip.known]
    changed = np.argwhere((before != after) & counted[:, None])
    different = {(answers.samples[row], place) for row, place in changed.tolist()}
    figures = {"top1": 1 - len(different) / total, "flips": flips, "flipped": len(new) / total}
    return figures, list(decision_faults(new, total, tolerances.max_flipped))


def _compare_neighbours(answers: Answers, pictures: str) -> tuple[int | None, float | None]:
    """How many neighbours can be compared among the pictures, and the share of them that is the same."""
    first = np.unique(answers.samples, return_index=True)[1]
    rows = first[answers.groups[first] == pictures]
    k = neighbours_of(len(rows))
    return k, shared_neighbours(answers.expected[rows], answers.found[rows], k) if k else None


def _pairs(expected: np.ndarray, found: np.ndarray) -> tuple[tuple[float, float], ...]:
    """At most `SCATTER` pairs of values, the same ones each time."""
    chosen = np.sort(np.random.default_rng(0).permutation(expected.size)[:SCATTER])
    one, other = expected.ravel()[chosen], found.ravel()[chosen]
    return tuple(zip(one.astype(float).tolist(), other.astype(float).tolist()))
