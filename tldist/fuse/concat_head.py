"""The head of a concatenation: standardised features, perhaps their principal components, one linear map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.extract import Features
from tldist.features.heads import DEFAULT_GRID, LinearHead, Sweep, sweep_logistic
from tldist.features.maps import principal, standardizing
from tldist.features.moments import Moments
from tldist.models.chain import Affine
from tldist.progress import say


@dataclass(frozen=True)
class Join:
    """What a concatenation's head is fitted with.

    Attributes:
        projection: principal components of the standardised features that the head reads; None: all of them.
        ridge: this multiple of a member's mean variance is added to its variances in the standardisation.
        held_out: the share of every class that chooses the strength of the head's penalty.
        grid: strengths to try.
        seed: of the choice of the samples held out.
        batch_size: images that one process handles at once.
        workers: decoding processes.
    """

    projection: int | None = None
    ridge: float = 0.01
    held_out: float = 0.2
    grid: Sequence[float] = DEFAULT_GRID
    seed: int = 0
    batch_size: int = 64
    workers: int = 0


@dataclass(frozen=True)
class Joined:
    """How the head came out.

    Attributes:
        sweep: the head and what chose its penalty.
        widths: features of each member.
        images: that it was fitted on.
        kept_variance: the share of the standardised features' variance in the projection; None without one.
    """

    sweep: Sweep
    widths: tuple[int, ...]
    images: int
    kept_variance: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "held_out_accuracy": self.sweep.held_out_accuracy,
            "held_out_loss": self.sweep.held_out_loss,
            "l2": self.sweep.head.l2,
            "l2_tried": [list(pair) for pair in self.sweep.tried],
            "features": list(self.widths),
            "images": self.images,
            "kept_variance": self.kept_variance,
        }


def fit_head(
    features: Features, held_out: Tensor, widths: Sequence[int], num_classes: int, options: Join
) -> tuple[Affine | None, Sweep, float | None]:
    """Standardise, project, fit.

    Returns:
        The projection with the standardisation in it, or None; the head for what it gives, or with the
        standardisation in it for the features as they are; the share of variance kept.
    """
    if not held_out.any() or held_out.all():
        raise DomainError("too few images can be decoded to choose the head's penalty.")
    say("fitting the head")
    weight, bias = _standardisation(features.features, widths, options.ridge)
    standard = features.features.double() * weight + bias
    if options.projection is None:
        sweep = sweep_logistic(standard, features.labels, num_classes, held_out, grid=options.grid)
        return None, _folded(sweep, weight, bias), None
    moments = Moments.from_batch(standard)
    affine = principal(moments, options.projection)
    projected = standard @ affine.weight.T + affine.bias
    sweep = sweep_logistic(projected, features.labels, num_classes, held_out, grid=options.grid)
    kept = float(projected.var(0).sum() / moments.variance.sum())
    affine.bias = affine.bias + affine.weight @ bias
    affine.weight = affine.weight * weight
    return affine, sweep, kept


def _standardisation(features: Tensor, widths: Sequence[int], ridge: float) -> tuple[Tensor, Tensor]:
    """Weight and bias, float64 (D,) each, by each member's own mean variance."""
    maps = [standardizing(Moments.from_batch(part), ridge) for part in features.split(tuple(widths), dim=1)]
    return torch.cat([each.weight for each in maps]), torch.cat([each.bias for each in maps])


def _folded(sweep: Sweep, weight: Tensor, bias: Tensor) -> Sweep:
    """The head of ``x * weight + bias`` as one of x."""
    head = sweep.head
    plain = LinearHead(head.weight * weight, head.bias + head.weight @ bias, head.l2, head.converged)
    return Sweep(plain, sweep.held_out_accuracy, sweep.held_out_loss, sweep.tried)
