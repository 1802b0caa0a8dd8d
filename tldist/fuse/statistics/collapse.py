"""Whether a merged classifier still tells images apart, by its answers and by its features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tldist.bundle import Task
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.fuse.statistics.walk import ChannelSums, Walk, walk_images
from tldist.models.heads import find_head, head_width, tapped
from tldist.models.load import input_tensor
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger

MIXED = 0.9
"""Up to this share of one answer, a model is taken to tell the images apart."""
_VANISHED = 1e-3
"""Of the parents' variance: features 30 times closer together. Ordinary averages lose a factor of 10."""

Answers = Counter[bytes]
"""How often each answer was given."""


def count_answers(logits: Tensor, task: Task) -> Answers:
    """The answers to images: a class each, or of several classes an image the set of those above a half.

    Args:
        logits: (N, K).
    """
    rows = (logits > 0) if task == "multilabel" else logits.argmax(1, keepdim=True)
    return Counter(row.tobytes() for row in rows.cpu().numpy())


def largest_share(answers: Answers) -> float:
    """The share of the most frequent answer; 1 of none."""
    return max(answers.values()) / answers.total() if answers else 1.0


@dataclass(frozen=True)
class Look:
    """A model on images.

    Attributes:
        count: images.
        share: of the most frequent answer.
        spread: the variance over images of what the head reads, summed over features.
    """

    count: int
    share: float
    spread: float


@torch.no_grad()
def look_at(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    walk: Walk,
    task: Task = "multiclass",
) -> Look:
    """Answers and features of a model on a domain; called by all processes together, the same on each.

    Args:
        model: on the team's device; put into evaluation mode, else unchanged.
        how: its preprocessing.
        domain: the images; labels are not read.
        team: the processes.
        ledger: takes the broken images.
        walk: which images; the same for all models that are compared.
        task: one class an image, or several.

    Raises:
        DomainError: too many broken images, or none that can be decoded.
    """
    model.eval()
    answers: Answers = Counter()
    sums = ChannelSums(head_width(find_head(model)[1]), team.device)
    with tapped(model) as features:
        for images, _ in walk_images(how, domain, team, ledger, walk, "features"):
            answers += count_answers(model(input_tensor(images, how)), task)
            sums.add(features())
    count, _, variance = sums.over(team)
    everywhere: Answers = sum(team.gather(answers), Counter())
    return Look(count, largest_share(everywhere), float(variance.sum()))


def check_features(merged: Look, parents: Sequence[Look], *, vanished: float = _VANISHED) -> str | None:
    """Whether a merged model no longer tells apart images that its parents do.

    Args:
        merged, parents: by `look_at`, on the same images.
        vanished: the least share of the parents' smallest variance that is not a collapse.

    Returns:
        What has happened to it, as a clause; None: nothing.
    """
    if merged.count < 2 or not parents:
        return None
    theirs = max(parent.share for parent in parents)
    if merged.share == 1 and theirs <= MIXED:
        return (
            f"it gives all {merged.count:,} images one answer, where its parents give at most {theirs:.0%} "
            f"of them the same"
        )
    least = min(parent.spread for parent in parents)
    if merged.spread < vanished * least:
        return (
            f"its features hardly differ between images: their variance is {merged.spread / least:.1e} of "
            f"that of its parents' at least"
        )
    return None
