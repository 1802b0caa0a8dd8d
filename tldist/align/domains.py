"""Which images an alignment fits on, and which it only reports on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tldist.domain import Domain
from tldist.errors import DomainError


@dataclass(frozen=True)
class Domains:
    """The images of an alignment.

    Attributes:
        source: labelled images that fit the map and the head.
        held_out: bool (N,) over ``source``: the samples that choose the head's penalty.
        target: images that fit the map; their labels are not read.
        test: target images to report the accuracy on, if they have labels.
        classes: of the source, in natural order.
    """

    source: Domain
    held_out: np.ndarray
    target: Domain
    test: Domain
    classes: tuple[str, ...]


def choose_domains(source: Domain, target: Domain, held_out: float, seed: int) -> Domains:
    """Choose the splits, and the source samples to hold out by a hash of (seed, id).

    Args:
        source, target: as opened, with all their splits.
        held_out: the share of every source class.
        seed: of the choice.

    Raises:
        DomainError: the source has no labels, a single class, or a single image in every class.
    """
    train = source.training_split()
    if not train.has_labels:
        raise DomainError(
            f"{train.name}: no labels. The source of an alignment needs them, one folder of images a class "
            f"or a label column; the target does not."
        )
    if train.is_multilabel:
        raise DomainError(
            f"{train.name}: its images have several classes each; align needs one class an image."
        )
    classes = train.used_classes
    if len(classes) < 2:
        raise DomainError(f"{train.name}: a single class '{classes[0]}'; a head needs at least two.")
    held = train.carve(held_out, seed)[1]
    if len(held) == 0:
        raise DomainError(
            f"{train.name}: every class has a single image, so none can be held out to choose the head's "
            f"penalty. Give at least two images of a class."
        )
    return Domains(
        source=train,
        held_out=np.isin(train.rows, held.rows),
        target=target.training_split(),
        test=target.evaluation_split(),
        classes=classes,
    )
