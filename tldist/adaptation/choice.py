"""The choice among models without labels of the target: several scorers combined by rank, and a guard.

Shapes: N labelled images of the source that nothing has learned from, M images of the target without labels,
D features, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax
from scipy.stats import rankdata

SOURCE_ONLY = "source_only"
"""The candidate that is not adapted."""

LEAST_ANSWERS = 0.5
"""Of the classes that source-only answers with on the target, counted by entropy: less is a collapse."""
LEAST_SOURCE = 0.75
"""Of source-only's accuracy on the source: less, and the model has forgotten its task."""


@dataclass(frozen=True)
class Evidence:
    """What a scorer sees of one model.

    Attributes:
        source_features: (N, D), what the head reads.
        source_logits: (N, K).
        source_labels: int64 (N,).
        target_features: (M, D).
        target_logits: (M, K).
    """

    source_features: np.ndarray
    source_logits: np.ndarray
    source_labels: np.ndarray
    target_features: np.ndarray
    target_logits: np.ndarray


Scorer = Callable[[Evidence], float]
"""How good a model is on the target, as far as can be told without labels: more is better."""


def entropy_score(seen: Evidence) -> float:
    """How sure the answers are: minus their mean entropy in nats (arXiv:1711.10288, section 3.3)."""
    log_p = log_softmax(seen.target_logits.astype(np.float64), axis=1)
    return float((np.exp(log_p) * log_p).sum(1).mean())


def information_score(seen: Evidence) -> float:
    """Sure answers, and diverse ones: the mutual information of images and answers in nats (Bridle et al.,
    NIPS 1991; arXiv:2002.08546, eq. 3-4)."""
    mean = np.exp(log_softmax(seen.target_logits.astype(np.float64), axis=1)).mean(0)
    return entropy_score(seen) + _entropy(mean)


SCORERS: dict[str, Scorer] = {"entropy": entropy_score, "information": information_score}
"""By name."""


def answered_classes(logits: np.ndarray) -> float:
    """With how many classes a model answers: exp of the entropy of its answers' histogram, 1 to K.

    Args:
        logits: (M, K).
    """
    counts = np.bincount(logits.argmax(1), minlength=logits.shape[1])
    return float(np.exp(_entropy(counts / counts.sum())))


def source_accuracy(seen: Evidence) -> float | None:
    """Share of right answers on the source; None where none of its images are held out."""
    if len(seen.source_labels) == 0:
        return None
    return float((seen.source_logits.argmax(1) == seen.source_labels).mean())


def why_refused(seen: Evidence, plain: Evidence) -> str | None:
    """Why a model may not be chosen, whatever its scores; None: it may.

    A model that gives all images one answer is as sure as can be, and several scorers love it.

    Args:
        seen: of the model.
        plain: of source-only.
    """
    answers, usual = answered_classes(seen.target_logits), answered_classes(plain.target_logits)
    if answers < LEAST_ANSWERS * usual:
        return f"collapsed: it answers with {answers:.1f} classes on the target, source-only with {usual:.1f}"
    accuracy, before = source_accuracy(seen), source_accuracy(plain)
    if accuracy is not None and before is not None and accuracy < LEAST_SOURCE * before:
        return f"forgot its task: accuracy {accuracy:.3f} on the source, source-only has {before:.3f}"
    if not np.isfinite(seen.target_logits).all():
        return "its outputs are not finite"
    return None


def combine_ranks(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean rank of each candidate over the scorers: 1 is the best; equal scores share their ranks, and
    one that is not a number comes last.

    Args:
        scores: by candidate and scorer; the same scorers for each.
    """
    names = list(scores)
    scorers = sorted({scorer for by_scorer in scores.values() for scorer in by_scorer})
    table = np.array([[scores[name][scorer] for scorer in scorers] for name in names], dtype=np.float64)
    table = np.where(np.isnan(table), -np.inf, table)
    ranks = np.stack([rankdata(-column, method="average") for column in table.T], axis=1)
    return dict(zip(names, ranks.mean(1).tolist()))


def choose(scores: Mapping[str, Mapping[str, float]], refused: Sequence[str] = ()) -> str:
    """The candidate of the best mean rank among those that are not refused. Of equal ones source-only: what
    is no better is not promoted; then the last.

    Args:
        scores: by candidate, from the earliest to the last, and by scorer; more is better.
        refused: candidates that may not be chosen.
    """
    allowed = {name: by_scorer for name, by_scorer in scores.items() if name not in refused}
    ranks = combine_ranks(allowed)
    places = {name: place for place, name in enumerate(allowed)}
    return min(allowed, key=lambda name: (ranks[name], name != SOURCE_ONLY, -places[name]))


def _entropy(shares: np.ndarray) -> float:
    present = shares[shares > 0]
    return float(-(present * np.log(present)).sum())
