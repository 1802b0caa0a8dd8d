"""The answers that are compared, and which decisions a package makes otherwise than PyTorch. NumPy alone.

Axes: M comparisons (samples times batch sizes), D values of an output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tldist.bundle import Task
from tldist.export.agreement import Flip, GroupAgreement


@dataclass(frozen=True)
class Answers:
    """One output on the rows of a comparison, by everybody who was asked.

    Attributes:
        expected: float32 (M, D), from PyTorch.
        found: float32 (M, D), from the package.
        groups: (M,) of text: the group of samples that each row belongs to. Each has a magnitude and a
            tolerance of its own, so that large values on noise hide no error on pictures.
        samples: (M,) the sample of each row; one may be compared at several batch sizes.
        referee: float64 (M, D), from PyTorch in float64.
        exported: float32 (M, D), from the package where it was made.
        fitted: float32 (M, D), from PyTorch on the pixels of another resize.
    """

    expected: np.ndarray
    found: np.ndarray
    groups: np.ndarray
    samples: np.ndarray
    referee: np.ndarray | None = None
    exported: np.ndarray | None = None
    fitted: np.ndarray | None = None


def decide(logits: np.ndarray, task: Task) -> np.ndarray:
    """int64 (M, 1): where the largest logit is; for multilabel (M, D): 1 where a logit is positive."""
    chosen = logits > 0 if task == "multilabel" else logits.argmax(1)[:, None]
    return chosen.astype(np.int64)


def find_flips(answers: Answers, task: Task, groups: Mapping[str, GroupAgreement]) -> tuple[Flip, ...]:
    """Decisions that changed, one a sample (and class, for multilabel), ties left out.

    Args:
        answers: logits.
        task: how they decide.
        groups: by name: what a margin is relative to, and what a tie is.
    """
    expected, multilabel = answers.expected, task == "multilabel"
    before, after = decide(expected, task), decide(answers.found, task)
    then = None if answers.exported is None else decide(answers.exported, task)
    flips: dict[tuple[int, int], Flip] = {}
    for row, place in np.argwhere(before != after).tolist():
        group = groups[str(answers.groups[row])]
        was, now = int(before[row, place]), int(after[row, place])
        gap = expected[row, place] if multilabel else expected[row, was] - expected[row, now]
        margin = float(abs(gap)) / group.magnitude
        known = then is not None and int(then[row, place]) == now
        key = int(answers.samples[row]), place
        if margin > group.tie and (key not in flips or not known):
            label = place if multilabel else None
            flips[key] = Flip(key[0], group.name, was, now, margin, known, label)
    return tuple(flips.values())
