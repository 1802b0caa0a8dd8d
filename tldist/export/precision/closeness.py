"""How near a graph's answers are to those of the float32 graph that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tldist.export.groups import relative_error, smallest_cosine
from tldist.runtime.package import LOGITS

TIE = 1e-4
"""A decision by no more than this, relative to the largest logit, is none: float32 itself says no more."""


@dataclass(frozen=True)
class Closeness:
    """Two graphs' answers to the same images.

    Attributes:
        images: how many.
        decided: how many of them the float32 graph decides by more than a tie; None: it decides nothing.
        flipped: how many of those decisions change.
        top1: share of equal decisions, ties among them.
        cosine: the smallest of any image and output; None where a value is NaN or infinite.
        max_relative: the largest error, relative to the output's largest value; None likewise.
    """

    images: int
    decided: int | None
    flipped: int | None
    top1: float | None
    cosine: float | None
    max_relative: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return asdict(self)


def closeness(expected: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]) -> Closeness:
    """Compare the outputs of two graphs.

    Args:
        expected, found: float32 (N, D) of each output, by name; decisions are those of the logits.
    """
    images = len(next(iter(expected.values())))
    decided = flipped = top1 = None
    if LOGITS in expected:
        decided, flipped, top1 = _decisions(expected[LOGITS], found[LOGITS])
    finite = all(np.isfinite(values).all() for values in found.values())
    pairs = [(expected[name], found[name]) for name in expected]
    return Closeness(
        images,
        decided,
        flipped,
        top1,
        min(smallest_cosine(one, other) for one, other in pairs) if finite else None,
        max(relative_error(one, other, _magnitude(one)) for one, other in pairs) if finite else None,
    )


def _magnitude(values: np.ndarray) -> float:
    return max(float(np.abs(values).max()), float(np.finfo(np.float32).tiny))


def _decisions(expected: np.ndarray, found: np.ndarray) -> tuple[int, int, float]:
    """How many decisions there are, how many of them flip, and the share that is equal."""
    equal = expected.argmax(1) == found.argmax(1)
    ordered = np.sort(expected, axis=1)
    second = ordered[:, -2] if expected.shape[1] > 1 else -np.inf
    clear = (ordered[:, -1] - second) > TIE * _magnitude(expected)
    return int(clear.sum()), int((clear & ~equal).sum()), float(equal.mean())
