"""MixVal: whether a model's answer to a mixture of two target images follows the image that prevails."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tldist.errors import DomainError

SHARE = 0.55
"""Of the image that prevails: the paper's."""


@dataclass(frozen=True)
class Consistency:
    """How often the answers to mixtures are those of the prevailing image.

    Attributes:
        intra: where both images have one answer; None: there is no such mixture.
        inter: where they have two answers; None: there is no such mixture.
        intra_count, inter_count: mixtures of each kind.
    """

    intra: float | None
    inter: float | None
    intra_count: int
    inter_count: int


def partners(count: int, seed: int = 0) -> Tensor:
    """With which image each is mixed: int64 (N,), never itself where there are two, each image once."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    chosen = torch.empty_like(order)
    chosen[order] = order.roll(-1)
    return chosen


def mix(images: Tensor, others: Tensor, share: float = SHARE) -> Tensor:
    """``share`` of the first images and the rest of the second, in a model's own input (normalised)."""
    return share * images + (1 - share) * others


def mix_consistency(answers: Tensor, partner: Tensor, mixed: Tensor) -> Consistency:
    """Interpolation consistency of mixtures within and between clusters; 1 is best.

    Hu et al. (NeurIPS 2023, "Mixed Samples as Probes for Unsupervised Model Selection"), with the
    pseudo-label of the prevailing image as that of the mixture. As there, a model is placed under each of
    the two, and the places averaged. 1 within clusters for a model that gives all images one answer.

    Args:
        answers: int64 (N,), the model's answers to the images.
        partner: int64 (N,), of `partners`.
        mixed: int64 (N,), its answers to the mixtures, in the order of the prevailing images.

    Raises:
        DomainError: the lengths differ.
    """
    if not len(answers) == len(partner) == len(mixed):
        raise DomainError(
            f"{len(answers)} answers, {len(partner)} partners, {len(mixed)} mixtures: one of each is needed."
        )
    same = answers == answers[partner]
    right = (mixed == answers).double()
    intra, inter = int(same.sum()), int((~same).sum())
    return Consistency(
        float(right[same].mean()) if intra else None,
        float(right[~same].mean()) if inter else None,
        intra,
        inter,
    )
