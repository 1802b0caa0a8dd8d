"""Which images an alignment fits on, and which it only reports on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tldist.domain import Domain
from tldist.domain.index import id_hash
from tldist.errors import DomainError


@dataclass(frozen=True)
class Domains:
    """The images of an alignment.

    Attributes:
        source: labelled images that fit the map and the head.
        held_out: bool (N,) over ``source``: the samples that choose the head's penalty.
        source_kept: bool (N,) over ``source``: the samples whose features are kept.
        target: images that fit the map; their labels are not read, but those of ``told``.
        target_kept: bool (N,) over ``target``.
        told: bool (N,) over ``target``: the samples whose labels are used; they are kept too.
        test: target images to report the accuracy on, if they have labels.
        classes: of the source, in natural order.
    """

    source: Domain
    held_out: np.ndarray
    source_kept: np.ndarray
    target: Domain
    target_kept: np.ndarray
    told: np.ndarray
    test: Domain
    classes: tuple[str, ...]


def choose_domains(
    source: Domain, target: Domain, *, held_out: float, samples: int, target_labels: int, seed: int
) -> Domains:
    """Choose the splits, and by a hash of (seed, id) the source samples to hold out, the samples to keep and
    the target samples whose labels are used.

    Args:
        source, target: as opened, with all their splits.
        held_out: the share of every source class.
        samples: to keep of each domain.
        target_labels: to use of each class of the target.
        seed: of the choices.

    Raises:
        DomainError: the source has no labels, a single class, or a single image in every class; or the
            target has no labels to use.
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
    kept = choose_samples(train, samples, seed)
    few = train.subset(np.flatnonzero(kept))
    held = few.carve(held_out, seed)[1]
    if len(held) == 0:
        raise DomainError(
            f"{few.name}: every class has a single image, so none can be held out to choose the head's "
            f"penalty. Give at least two images of a class."
        )
    fitted = target.training_split()
    told = choose_told(fitted, classes, target_labels, seed)
    return Domains(
        source=train,
        held_out=np.isin(train.rows, held.rows),
        source_kept=kept,
        target=fitted,
        target_kept=choose_samples(fitted, samples, seed) | told,
        told=told,
        test=target.evaluation_split(),
        classes=classes,
    )


def choose_samples(domain: Domain, count: int, seed: int) -> np.ndarray:
    """bool (N,): at most ``count`` samples, whatever their labels."""
    if len(domain) <= count:
        return np.ones(len(domain), dtype=bool)
    return _first(domain, np.arange(len(domain)), count, f"keep:{seed}")


def choose_told(domain: Domain, classes: tuple[str, ...], count: int, seed: int) -> np.ndarray:
    """bool (N,): at most ``count`` samples of each class.

    Raises:
        DomainError: there are no labels, or a class is not among ``classes``.
    """
    told = np.zeros(len(domain), dtype=bool)
    if count == 0:
        return told
    if domain.is_multilabel or not domain.used_classes:
        raise DomainError(
            f"{domain.name}: target_labels={count} asks for labels (one class an image), and there are none."
        )
    labels = domain.labels_in(classes)
    for label in np.unique(labels[labels >= 0]):
        told |= _first(domain, np.flatnonzero(labels == label), count, f"tell:{seed}")
    return told


def _first(domain: Domain, members: np.ndarray, count: int, salt: str) -> np.ndarray:
    ranked = sorted(members.tolist(), key=lambda index: id_hash(f"{salt}:{domain.id(index)}"))
    chosen = np.zeros(len(domain), dtype=bool)
    chosen[ranked[:count]] = True
    return chosen
