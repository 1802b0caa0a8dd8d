"""What a student is taught by: its teachers' soft targets, labels, and the teachers' features.

Shapes: N images; K classes of the student; J outputs of all teachers, one teacher after the other; D features
of all teachers, likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def vote_matrix(known: Sequence[Sequence[str]], shares: Sequence[float], classes: Sequence[str]) -> Tensor:
    """How the teachers' probabilities become those of the student's classes, by class names.

    A teacher that does not know a class gives it no vote, and not a vote of zero: a class's probability is
    the weighted mean over the teachers that know it.

    Args:
        known: the classes of each teacher; their order does not matter.
        shares: weight of each teacher, not negative, sum 1.
        classes: of the student.

    Returns:
        float64 (J, K): entry (j, k) is the share of the teacher of output j among those that know class k,
        where j is class k by name, else 0. A column of zeros is a class that no teacher knows.
    """
    place = {name: column for column, name in enumerate(classes)}
    votes = torch.zeros(sum(map(len, known)), len(classes), dtype=torch.float64)
    row = 0
    for names, share in zip(known, shares, strict=True):
        for name in names:
            if name in place:
                votes[row, place[name]] = share
            row += 1
    voters = votes.sum(0)
    return votes / torch.where(voters > 0, voters, 1.0)


def soft_targets(logits: Tensor, widths: Sequence[int], votes: Tensor, temperature: float) -> Tensor:
    """What the teachers together hold likely: each one's softmax at a temperature (arXiv:1503.02531, eq. 1),
    their weighted arithmetic mean by class (section 2: one of its two means), divided by the sum.

    The division changes nothing where all teachers know the same classes. Elsewhere the means of the classes
    come from different teachers, and their sum is above 1.

    Args:
        logits: (N, J), calibrated, of all teachers.
        widths: outputs of each teacher, sum J.
        votes: (J, K), of `vote_matrix`.
        temperature: T.

    Returns:
        (N, K), rows of sum 1; 0 for classes that no teacher knows.
    """
    each = [(part / temperature).softmax(1) for part in logits.split(list(widths), 1)]
    means = torch.cat(each, 1) @ votes
    return means / means.sum(1, keepdim=True)


def teachers_loss(logits: Tensor, targets: Tensor, voted: Tensor, temperature: float) -> Tensor:
    """``T^2 * KL(teachers || student)`` of each sample, both at temperature T (arXiv:1503.02531, section 2).

    T^2 keeps the gradient's size when T changes. The student is compared on the classes that some teacher
    knows, as a distribution over those (arXiv:1904.06062, section 3): what labels alone teach is not pulled
    to zero by teachers that have never heard of it.

    Args:
        logits: (N, K), of the student.
        targets: (N, K), of `soft_targets`.
        voted: bool (K,), the classes that some teacher knows.
        temperature: T.
    """
    answers = (logits[:, voted] / temperature).log_softmax(1)
    kl = nn.functional.kl_div(answers, targets[:, voted], reduction="none").sum(1)
    return temperature**2 * kl


def labels_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample (N,); whatever where the label is -1 (it has no share there).

    Args:
        logits: (N, K), of the student.
        labels: int64 (N,).
    """
    return nn.functional.cross_entropy(logits, labels.clamp(min=0), reduction="none")


def features_loss(projected: Tensor, features: Tensor, weights: Tensor) -> Tensor:
    """Weighted squared error of each sample between the student's projected features and the teachers'
    (FitNets, arXiv:1412.6550, eq. 3, on the last layer).

    Args:
        projected: (N, D).
        features: (N, D), standardised.
        weights: (D,), sum 1: a teacher's share, evenly over its features.
    """
    return (projected - features).square() @ weights


def total_loss(teachers: Tensor, labels: Tensor, has_label: Tensor, labels_share: float) -> Tensor:
    """Both losses of each sample together (arXiv:1503.02531, section 2): labels have their share where there
    is one; without it, all is the teachers'.

    Args:
        teachers, labels: (N,), of `teachers_loss` and `labels_loss`.
        has_label: bool (N,).
        labels_share: in [0, 1].
    """
    share = labels_share * has_label.to(teachers.dtype)
    return (1 - share) * teachers + torch.where(has_label, share * labels, 0.0)
