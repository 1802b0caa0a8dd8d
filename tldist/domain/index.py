"""A domain as an index of samples: random access to bytes, labels by name, a fingerprint."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from tldist.errors import DomainError, close_matches

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""The names under which splits are found, and the one that each is known by."""

WHOLE = "all"
"""The split of a domain that has none."""


class Source(Protocol):
    """Random access to the samples of one data set, by row."""

    def __len__(self) -> int: ...

    def id(self, row: int) -> str:
        """A name that is unique in the domain."""
        ...

    def size(self, row: int) -> int:
        """Bytes of the image, or of what holds it, for the fingerprint."""
        ...

    def read(self, row: int) -> bytes:
        """The bytes of the image file.

        Raises:
            BadImage: they cannot be read.
        """
        ...


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which 2 comes before 10 and a before B."""
    parts = re.split(r"(\d+)", name)
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part.casefold()) for part in parts if part
    )


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Distinct class names in the order that people expect (ties by the plain text)."""
    return tuple(sorted(set(names), key=lambda name: (natural_key(name), name)))


@dataclass(frozen=True)
class Domain:
    """An ordered selection of the samples of a source.

    Attributes:
        name: what it was opened as.
        source: random access to the samples.
        rows: int64 (N,), the source's rows in order.
        labels: int32 (N,), index into ``classes``; -1 where there is no label.
        classes: class names in natural order; a label is known by its name, never by its position.
        splits: (N,) of text: the split of each sample.
        max_bad: the share of broken images that is tolerated.
        tags: bool (N, K), the classes of each sample, where a sample may have several or none; ``labels`` are
            all -1 then. None: a sample has one class at most.
    """

    name: str
    source: Source
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    splits: np.ndarray
    max_bad: float = 0.01
    tags: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def id(self, index: int) -> str:
        """The unique name of a sample."""
        return self.source.id(int(self.rows[index]))

    def read(self, index: int) -> bytes:
        """The bytes of a sample's image file (`BadImage` where they cannot be read)."""
        return self.source.read(int(self.rows[index]))

    @cached_property
    def split_counts(self) -> dict[str, int]:
        """Samples of each split, in the order train, val, test, others."""
        names, counts = np.unique(self.splits, return_counts=True)
        order = {"train": 0, "val": 1, "test": 2}
        pairs = sorted(
            zip(names.tolist(), counts.tolist()), key=lambda pair: (order.get(pair[0], 3), pair[0])
        )
        return dict(pairs)

    @property
    def has_labels(self) -> bool:
        """Whether every sample has a label."""
        return len(self) > 0 and (self.is_multilabel or bool((self.labels >= 0).all()))

    @property
    def is_multilabel(self) -> bool:
        """Whether a sample may have several classes, or none."""
        return self.tags is not None

    @property
    def used_classes(self) -> tuple[str, ...]:
        """Names of the classes that samples have, in natural order."""
        if self.tags is not None:
            return tuple(self.classes[place] for place in np.flatnonzero(self.tags.any(axis=0)))
        return tuple(self.classes[label] for label in np.unique(self.labels) if label >= 0)

    def subset(self, indices: np.ndarray | Sequence[int]) -> Domain:
        """The samples at ``indices``, in that order."""
        chosen = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            rows=self.rows[chosen],
            labels=self.labels[chosen],
            splits=self.splits[chosen],
            tags=None if self.tags is None else self.tags[chosen],
        )

    def split(self, name: str) -> Domain:
        """The samples of one split.

        Raises:
            DomainError: there is no such split.
        """
        wanted = SPLITS.get(name, name)
        if wanted not in self.split_counts:
            there = ", ".join(self.split_counts)
            raise DomainError(f"{self.name}: no split '{name}' (splits here: {there}).")
        return replace(self.subset(np.flatnonzero(self.splits == wanted)), name=f"{self.name}:{wanted}")

    def training_split(self) -> Domain:
        """The split to learn from: train, else all there is."""
        return self.split("train") if "train" in self.split_counts else self

    def evaluation_split(self) -> Domain:
        """The split to measure on: test, else val, else all there is."""
        for name in ("test", "val"):
            if name in self.split_counts:
                return self.split(name)
        return self

    def limited(self, limit: int | None) -> Domain:
        """At most ``limit`` samples of each split, spread evenly over the classes, chosen by their ids."""
        if limit is None:
            return self
        kept: list[int] = []
        for name in self.split_counts:
            members = np.flatnonzero(self.splits == name)
            kept += _spread(members, self.labels, [id_hash(self.id(i)) for i in members.tolist()], limit)
        return self.subset(sorted(kept))

    def carve(self, fraction: float, seed: int) -> tuple[Domain, Domain]:
        """Hold out a share of every class, chosen by a hash of (seed, id), never by position; of all samples
        together where they have several classes.

        Returns:
            (the rest, the held-out part); a class of one sample stays in the rest.
        """
        held: list[int] = []
        for label in np.unique(self.labels):
            members = np.flatnonzero(self.labels == label)
            ranked = sorted(members.tolist(), key=lambda i: id_hash(f"{seed}:{self.id(i)}"))
            count = 0 if len(members) < 2 else max(1, round(fraction * len(members)))
            held += ranked[:count]
        chosen = np.zeros(len(self), dtype=bool)
        chosen[held] = True
        return self.subset(np.flatnonzero(~chosen)), self.subset(np.flatnonzero(chosen))

    def labels_in(self, classes: Sequence[str]) -> np.ndarray:
        """Labels in another list of class names.

        Returns:
            int64 (N,): positions in the list, -1 where there is none. Of a multi-label domain float32 (N, K):
            1 for the classes that a sample has.

        Raises:
            DomainError: a class of this domain is not in the list.
        """
        position = {name: place for place, name in enumerate(classes)}
        missing = [name for name in self.used_classes if name not in position]
        if missing:
            hint = close_matches(missing[0], classes) if classes else "The model has no classes."
            raise DomainError(
                f"{self.name}: {len(missing)} of its classes are unknown to the model: "
                f"{', '.join(missing[:5])}. {hint}"
            )
        if self.tags is not None:
            targets = np.zeros((len(self), len(classes)), dtype=np.float32)
            for column, name in enumerate(self.classes):
                if name in position:
                    targets[:, position[name]] = self.tags[:, column]
            return targets
        table = np.array([position.get(name, -1) for name in self.classes] + [-1], dtype=np.int64)
        return table[self.labels]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the domain holds: ids, class names, splits, sizes; not of where it lies."""
        digest = hashlib.sha256()
        for index, row in enumerate(self.rows.tolist()):
            parts = (
                self.source.id(row),
                self._label_text(index),
                str(self.splits[index]),
                str(self.source.size(row)),
            )
            digest.update(("\0".join(parts) + "\n").encode())
        return digest.hexdigest()

    def _label_text(self, index: int) -> str:
        if self.tags is not None:
            return "\1".join(["", *(self.classes[place] for place in np.flatnonzero(self.tags[index]))])
        return self.classes[self.labels[index]] if self.labels[index] >= 0 else ""


def id_hash(text: str) -> str:
    """A hash that orders samples at random, the same on every machine."""
    return hashlib.sha256(text.encode()).hexdigest()


def _spread(members: np.ndarray, labels: np.ndarray, keys: list[str], limit: int) -> list[int]:
    """``limit`` of ``members``, as even over the labels as can be: round by round, one of each label."""
    by_label: dict[int, list[tuple[str, int]]] = {}
    for member, key in zip(members.tolist(), keys):
        by_label.setdefault(int(labels[member]), []).append((key, member))
    ranked = [
        (place, key, member)
        for group in by_label.values()
        for place, (key, member) in enumerate(sorted(group))
    ]
    return [member for _, _, member in sorted(ranked)[:limit]]
