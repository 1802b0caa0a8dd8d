"""Whether an adapted model has collapsed: its answers to target images against those of source-only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tldist.features.arrays import Values
from tldist.features.scorers.answers import entropy_of, probabilities

LEAST_CLASSES = 0.7
"""Of the classes that are expected, by exp(entropy): below, too many images share too few answers."""
LEAST_AGREEMENT = 0.2
"""Cohen's kappa with source-only: below, the answers have little to do with what the source taught."""
LEAST_SOURCE = 0.75
"""Of source-only's accuracy on held-out source images: below, the source's task has been forgotten."""
_ENOUGH = 20
"""Images of a class that source-only must have found before their loss counts."""


@dataclass(frozen=True)
class Answers:
    """A model's answers to the target's images.

    Attributes:
        predictions: int64 (N,), the largest logit's class.
        mean: float64 (K,), the mean of the probabilities.
        source_accuracy: on held-out source images; None: not known.
    """

    predictions: Tensor = field(repr=False)
    mean: Tensor = field(repr=False)
    source_accuracy: float | None = None

    @classmethod
    def of(cls, logits: Values, source_accuracy: float | None = None) -> Answers:
        """Of logits (N, K) on target images."""
        found = probabilities(logits).cpu()
        return cls(found.argmax(1), found.mean(0), source_accuracy)

    @property
    def shares(self) -> Tensor:
        """float64 (K,), the part of the images that gets each answer."""
        return self.predictions.bincount(minlength=len(self.mean)).double() / len(self.predictions)

    @property
    def effective_classes(self) -> float:
        """exp(entropy) of the answers, hard or as probabilities, whichever are less varied: 1 to K."""
        return float(torch.minimum(entropy_of(self.shares), entropy_of(self.mean)).exp())

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "shares": self.shares.tolist(),
            "effective_classes": self.effective_classes,
            "source_accuracy": self.source_accuracy,
        }


def agreement(first: Tensor, second: Tensor, num_classes: int) -> float:
    """Cohen's kappa of two models' answers (N,): 1 for the same, about 0 for answers by chance.

    Where chance alone would make all of them equal it is 1 if they are, else 0.
    """
    shares = [answers.bincount(minlength=num_classes).double() / len(answers) for answers in (first, second)]
    chance = float(shares[0] @ shares[1])
    same = float((first == second).double().mean())
    return (same - chance) / (1 - chance) if chance < 1 else float(same == 1)


def why_collapsed(candidate: Answers, source_only: Answers, prior: Tensor | None = None) -> str | None:
    """What is wrong with a candidate's answers, as a clause; None: nothing.

    Four signs, none of which reads a target label:

    - it uses fewer classes than 0.7 of what is expected: by source-only's answers or by the prior, whichever
      expects fewer;
    - a class that source-only gave to many images (half of an even share) is hardly given any more;
    - its answers agree with source-only's hardly more than by chance (classes have swapped places);
    - its accuracy on held-out source images is below 0.75 of source-only's.

    Args:
        candidate, source_only: on the same target images, in the same order.
        prior: float64 (K,), the classes' shares among the source images; None: even.
    """
    classes = len(candidate.mean)
    even = torch.full((classes,), 1 / classes, dtype=torch.float64)
    expected = min(float(entropy_of(even if prior is None else prior).exp()), source_only.effective_classes)
    found = candidate.effective_classes
    if found < LEAST_CLASSES * expected:
        return f"collapsed: answers as varied as {found:.1f} even classes, {expected:.1f} are expected"
    lost = _lost_classes(candidate, source_only)
    if lost:
        return f"collapsed: hardly any image is of class {', '.join(map(str, lost))} any more"
    kappa = agreement(candidate.predictions, source_only.predictions, classes)
    if kappa < LEAST_AGREEMENT:
        return f"its answers agree with source-only's hardly more than by chance (kappa {kappa:.2f})"
    if candidate.source_accuracy is not None and source_only.source_accuracy is not None:
        least = LEAST_SOURCE * source_only.source_accuracy
        if candidate.source_accuracy < least:
            return (
                f"its accuracy on held-out source images is {candidate.source_accuracy:.3f}, "
                f"where source-only has {source_only.source_accuracy:.3f}"
            )
    return None


def _lost_classes(candidate: Answers, source_only: Answers) -> list[int]:
    """Classes that source-only gave to many images and the candidate to less than a tenth of those."""
    count, classes = len(source_only.predictions), len(source_only.mean)
    many = max(_ENOUGH / count, 0.5 / classes)
    lost = (source_only.shares >= many) & (candidate.shares < 0.1 * source_only.shares)
    found: list[int] = lost.nonzero().flatten().tolist()
    return found
