"""The models that a fusion starts from: what they are, and do they fit together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tldist.bundle import BundleConfig, read_bundle
from tldist.errors import BundleError
from tldist.fuse.weights.files import Reader, Weights, open_weights
from tldist.fuse.weights.policy import MEAN, VAR, beside
from tldist.models.description import architecture_name, num_outputs, with_outputs
from tldist.progress import warn


@dataclass(frozen=True)
class Parent:
    """One model to fuse.

    Attributes:
        label: as it was asked for.
        folder: the bundle.
        config: what it is.
        weights: where its tensors are.
    """

    label: str
    folder: Path
    config: BundleConfig
    weights: Weights


def read_parents(paths: Sequence[Path]) -> list[Parent]:
    """Read the configurations of bundles and check their files.

    Raises:
        BundleError: see `read_bundle`.
    """
    parents = []
    for path in paths:
        folder, config = read_bundle(path)
        parents.append(Parent(str(path), folder, config, open_weights(folder)))
    return parents


def check_tasks(parents: Sequence[Parent]) -> None:
    """Check that all models answer in one way.

    Raises:
        BundleError: one answers with one class an image, another with any number.
    """
    first = parents[0]
    for other in parents[1:]:
        if other.config.task != first.config.task:
            raise BundleError(
                f"{other.label} is {other.config.task} and {first.label} is {first.config.task}: one answers "
                f"with one class an image, the other with any number. They cannot be fused."
            )


def check_fit(parents: Sequence[Parent]) -> None:
    """Check that models can be merged in weight space: one architecture (but for the number of classes), one
    input.

    Raises:
        BundleError: they cannot; the two that differ are named.
    """
    first = parents[0]
    for other in parents[1:]:
        if _without_classes(other) != _without_classes(first):
            names = [architecture_name(parent.config.model) for parent in (first, other)]
            detail = " and ".join(names) if names[0] != names[1] else f"{names[0]} with other options"
            raise BundleError(
                f"{other.label} and {first.label} are not of one architecture ({detail}): their weights "
                f"cannot be merged. method=ensemble, concat and distill fuse models of any architectures."
            )
        mine, theirs = first.config.preprocessing, other.config.preprocessing
        if (mine.mean, mine.std) != (theirs.mean, theirs.std):
            raise BundleError(
                f"{other.label} normalises its input by mean {list(theirs.mean)} and std {list(theirs.std)}, "
                f"{first.label} by {list(mine.mean)} and {list(mine.std)}. Fine-tune one of them on the "
                f"other's normalisation first."
            )
        if mine != theirs:
            warn(
                f"{other.label} was made for input {theirs.height}x{theirs.width} (resize {theirs.resize}); "
                f"the result takes {mine.height}x{mine.width} (resize {mine.resize}) as {first.label} does"
            )


def _without_classes(parent: Parent) -> dict[str, object]:
    model = parent.config.model
    return with_outputs(model, 0) if num_outputs(model) == len(parent.config.classes) else model


def agreed_statistics(parents: Sequence[Parent]) -> set[str]:
    """Paths of the BatchNorm layers whose statistics are the same in all models.

    They were frozen in all of them, or no model was trained: there is nothing to re-estimate, and a few
    images would only make them noisier.
    """
    if len(parents) < 2:
        return set()
    agreed = set()
    first, *others = [parent.weights.entries for parent in parents]
    with Reader() as reader:
        for parent in parents:
            reader.open(parent.weights)
        for name in first:
            path, _, buffer = name.rpartition(".")
            if buffer != VAR:
                continue
            pair = (name, beside(name, MEAN))
            own = [reader.read(first[n]) for n in pair]
            if all(
                np.array_equal(reader.read(other[n]), mine) for other in others for n, mine in zip(pair, own)
            ):
                agreed.add(path)
    return agreed
