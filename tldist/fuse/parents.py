"""The models that a fusion starts from: do they fit together, and their tensors, one name at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tldist.bundle import WEIGHTS, BundleConfig, read_bundle
from tldist.domain import sort_names
from tldist.errors import BundleError
from tldist.models.description import architecture_name
from tldist.progress import warn


@dataclass(frozen=True)
class Parent:
    """One model to merge.

    Attributes:
        label: as it was asked for.
        folder: the bundle.
        config: what it is.
    """

    label: str
    folder: Path
    config: BundleConfig


def read_parents(paths: Sequence[Path]) -> list[Parent]:
    """Read the configurations of bundles and check their files.

    Raises:
        BundleError: see `read_bundle`.
    """
    return [Parent(str(path), *read_bundle(path)) for path in paths]


def check_fit(parents: Sequence[Parent]) -> None:
    """Check that models can be merged: one architecture, one set of classes, one input.

    Raises:
        BundleError: they cannot; the two that differ are named.
    """
    first = parents[0]
    for other in parents[1:]:
        _check_classes(first, other)
        if other.config.model != first.config.model:
            names = [architecture_name(parent.config.model) for parent in (first, other)]
            detail = " and ".join(names) if names[0] != names[1] else f"{names[0]} with other options"
            raise BundleError(
                f"{other.label} and {first.label} are not of one architecture ({detail}). "
                f"Weights can only be merged within one."
            )
        if other.config.task != first.config.task:
            raise BundleError(
                f"{other.label} is {other.config.task} and {first.label} is {first.config.task}: one answers "
                f"with one class an image, the other with any number. They cannot be merged."
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


def agreed_statistics(parents: Sequence[Parent]) -> set[str]:
    """Paths of the BatchNorm layers whose statistics are the same in all models.

    They were frozen in all of them, or no model was trained: there is nothing to re-estimate, and a few
    images would only make them noisier.
    """
    if len(parents) < 2:
        return set()
    agreed = set()
    with open_tensors(parents, reference=parents[0], head="") as tensors:
        for name in tensors.names:
            path, _, buffer = name.rpartition(".")
            if buffer == "running_var":
                both = (tensors.read(name), tensors.read(f"{path}.running_mean"))
                if all(torch.equal(values[0], other) for values in both for other in values[1:]):
                    agreed.add(path)
    return agreed


def _check_classes(first: Parent, other: Parent) -> None:
    mine, theirs = set(first.config.classes), set(other.config.classes)
    if mine == theirs:
        return
    parts = []
    for parent, names in ((first, mine - theirs), (other, theirs - mine)):
        if names:
            shown = ", ".join(sort_names(names)[:5]) + (", ..." if len(names) > 5 else "")
            parts.append(f"{len(names)} only in {parent.label} ({shown})")
    raise BundleError(
        f"{first.label} and {other.label} answer different classes: {'; '.join(parts)}. This version merges "
        f"models of equal classes (in any order); fine-tune both on the same classes first."
    )


class Tensors:
    """The tensors of all parents, read from their files when asked for.

    Args:
        parents: whose files are open.
        files: the open safetensors files, one a parent.
        classes: the order into which the rows of the heads are put.
        head: path of the head.
    """

    def __init__(
        self, parents: Sequence[Parent], files: Sequence[Any], classes: Sequence[str], head: str
    ) -> None:
        self.parents, self.files = parents, files
        self.head = {f"{head}.weight", f"{head}.bias"}
        self.rows = [[parent.config.classes.index(name) for name in classes] for parent in parents]
        self.names = list(files[0].keys())
        self._check_names()

    def read(self, name: str) -> list[Tensor]:
        """The tensors of one name, one a parent."""
        tensors = [file.get_tensor(name) for file in self.files]
        if name in self.head:
            tensors = [tensor[rows] if rows else tensor for tensor, rows in zip(tensors, self.rows)]
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            raise BundleError(f"the tensor '{name}' has different shapes: {', '.join(map(str, shapes))}.")
        return tensors

    def _check_names(self) -> None:
        for parent, file in zip(self.parents, self.files):
            odd = sorted(set(self.names) ^ set(file.keys()))
            if odd:
                raise BundleError(
                    f"{parent.label} and {self.parents[0].label} do not hold the same tensors: {odd[0]} "
                    f"and {len(odd) - 1} more are in one of them only."
                )


@contextmanager
def open_tensors(parents: Sequence[Parent], *, reference: Parent, head: str) -> Iterator[Tensors]:
    """Open the weights of all parents; nothing is read before it is asked for.

    Args:
        parents: whose weights.
        reference: whose class order the rows of all heads are put into.
        head: path of the head.
    """
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(parent.folder / WEIGHTS, framework="pt")) for parent in parents
        ]
        yield Tensors(parents, files, reference.config.classes, head)
