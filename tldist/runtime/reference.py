"""The samples that a package carries: images, what PyTorch answered for them, and what the package did.

With them a package can be checked where it serves, without torch. One safetensors file: ``images`` (uint8),
``picture.N`` (uint8, images of other sizes), and for each output ``expected.NAME`` (float32),
``referee.NAME`` (float64), ``exported.NAME`` (float32) and perhaps ``fitted.NAME`` (float32).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tldist.errors import PackageError

EXTREMES = ("black", "white", "noise")
"""Groups of images that no camera takes."""
SLACK = 8.0
"""A tolerance is widened to this multiple of PyTorch's own float32 error, where that is larger: two correct
float32 implementations are each off by about that much, and the largest error seen varies from one to the
other (up to 6 times was seen on chaotic, untrained networks)."""
MOST_STORED = 16
"""Pictures of each group that a package carries, whatever was compared when it was made."""

_ANSWERS = ("expected.", "referee.", "exported.", "fitted.")
_PICTURE = "picture."
_MOST_BYTES = 16 * 2**20
"""Of pictures in a package; further ones are left out."""


@dataclass(frozen=True)
class Samples:
    """Images to compare on, group by group.

    Attributes:
        images: uint8 (N, H, W, 3), of the model's own size.
        groups: (name, number of images) in order; the numbers add up to ``len(samples)``.
        ids: a name for each image.
        pictures: uint8 (H, W, 3) each, of any size, for graphs that take more than one. They follow
            ``images``: the rows of answers are first those of ``images``, then those of ``pictures``.
    """

    images: np.ndarray
    groups: tuple[tuple[str, int], ...]
    ids: tuple[str, ...]
    pictures: tuple[np.ndarray, ...] = ()

    def __len__(self) -> int:
        return len(self.images) + len(self.pictures)

    @property
    def group_of(self) -> np.ndarray:
        """(len,) of text: the group of each image."""
        return np.repeat([name for name, _ in self.groups], [count for _, count in self.groups])

    def collect(self, run: Callable[[np.ndarray], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What ``run`` gives for images of one size, for all of them: by name, rows back in their places."""
        parts = [(rows, run(images)) for rows, images in self.by_size()]
        if not parts:
            return {}
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        return {name: np.concatenate([found[name] for _, found in parts])[order] for name in parts[0][1]}

    def by_size(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows (n,) and images (n, H, W, 3) of each size: what can run together."""
        first = len(self.images)
        if first:
            yield np.arange(first), self.images
        sizes: dict[tuple[int, ...], list[int]] = {}
        for place, picture in enumerate(self.pictures):
            sizes.setdefault(picture.shape, []).append(place)
        for places in sizes.values():
            yield first + np.array(places), np.stack([self.pictures[place] for place in places])

    def take(self, rows: np.ndarray) -> Samples:
        """Some of the samples: ``rows`` are positions in rising order."""
        first = len(self.images)
        names = self.group_of[rows].tolist()
        return Samples(
            images=self.images[rows[rows < first]],
            groups=tuple((name, names.count(name)) for name in dict.fromkeys(names)),
            ids=tuple(self.ids[row] for row in rows.tolist()),
            pictures=tuple(self.pictures[row - first] for row in rows.tolist() if row >= first),
        )

    def find_problem(self) -> str:
        """Why this is no set of samples; empty where it is one. A file can hold anything."""
        if self.images.dtype != np.uint8 or self.images.ndim != 4 or self.images.shape[3] != 3:
            return f"images are {self.images.dtype} {self.images.shape}, expected uint8 (N, H, W, 3)"
        for picture in self.pictures:
            if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
                return f"a picture is {picture.dtype} {picture.shape}, expected uint8 (H, W, 3)"
        counts = [count for _, count in self.groups]
        if not len(self) or min(counts, default=0) < 0 or {sum(counts), len(self.ids)} != {len(self)}:
            return f"{len(self)} images, {sum(counts)} in groups, {len(self.ids)} names"
        return ""


@dataclass(frozen=True)
class Reference:
    """Samples with answers.

    Attributes:
        samples: the images.
        expected: float32 (N, D) of each output: the bundle in float32.
        referee: float64 (N, D) of each output: the bundle in float64; empty where it cannot run so.
        exported: float32 (N, D) of each output: the package itself on the machine that made it, each
            image alone; empty where not recorded. A machine that serves computes the same, or says so.
        fitted: float32 (N, D) of each output, where the graph resizes pictures itself: the bundle in float32
            on the pixels that training's resize makes, while ``expected`` and ``referee`` are on those of
            the graph. Both round to whole grey levels; how far the answers differ by it is the allowance of
            another machine, whose rounding may be a third.
    """

    samples: Samples
    expected: dict[str, np.ndarray]
    referee: dict[str, np.ndarray] = field(default_factory=dict)
    exported: dict[str, np.ndarray] = field(default_factory=dict)
    fitted: dict[str, np.ndarray] = field(default_factory=dict)

    def take(self, rows: np.ndarray) -> Reference:
        """Some of the samples and their answers: ``rows`` are positions in rising order."""
        return Reference(
            self.samples.take(rows),
            *({name: values[rows] for name, values in part.items()} for part in self._answers()),
        )

    def with_exported(self, answers: dict[str, np.ndarray]) -> Reference:
        """The same with the package's own answers."""
        return replace(self, exported=answers)

    def _answers(self) -> tuple[dict[str, np.ndarray], ...]:
        """In the order of the fields."""
        return self.expected, self.referee, self.exported, self.fitted


def largest_error(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference of two arrays, computed in float64; NaN or infinite where a value is, infinite
    where their shapes differ."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())


def thin(reference: Reference, most: int = MOST_STORED) -> Reference:
    """What a package carries of a comparison: all extremes, and ``most`` images of each other group.

    They are spread evenly over the group; of images of many sizes, as many as 16 MiB hold.
    """
    groups = reference.samples.group_of
    kept: list[int] = []
    for name, count in reference.samples.groups:
        rows = np.flatnonzero(groups == name)
        if name not in EXTREMES and count > most:
            rows = rows[np.linspace(0, count - 1, most).round().astype(int)]
        kept += rows.tolist()
    return reference.take(np.array(_within_bytes(reference.samples, sorted(kept)), dtype=int))


def _within_bytes(samples: Samples, rows: list[int]) -> list[int]:
    first, total = len(samples.images), 0
    kept: list[int] = []
    for row in rows:
        total += samples.pictures[row - first].nbytes if row >= first else 0
        if total <= _MOST_BYTES or row < first or not kept:
            kept.append(row)
    return kept


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference as one safetensors file."""
    samples = reference.samples
    tensors = {"images": samples.images}
    tensors |= {f"{_PICTURE}{place}": picture for place, picture in enumerate(samples.pictures)}
    for prefix, part in zip(_ANSWERS, reference._answers()):
        tensors |= {prefix + name: values for name, values in part.items()}
    about = {"groups": json.dumps(samples.groups), "ids": json.dumps(samples.ids)}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata=about)


def read_reference(path: Path) -> Reference:
    """Read a reference.

    Raises:
        PackageError: missing, damaged, or not a reference.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        groups = tuple((str(name), int(count)) for name, count in json.loads(about["groups"]))
        others = _part(tensors, _PICTURE)
        pictures = tuple(others[name] for name in sorted(others, key=int))
        samples = Samples(tensors["images"], groups, tuple(json.loads(about["ids"])), pictures)
        parts = [_part(tensors, prefix) for prefix in _ANSWERS]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise PackageError(f"{path}: cannot be read as reference samples: {error}.") from error
    problem = samples.find_problem() or _find_problem(parts, len(samples))
    if problem:
        raise PackageError(f"{path}: not reference samples: {problem}.")
    return Reference(samples, *parts)


def _find_problem(parts: list[dict[str, np.ndarray]], rows: int) -> str:
    for part in parts:
        for name, values in part.items():
            if values.ndim != 2 or len(values) != rows or values.dtype not in (np.float32, np.float64):
                return f"answers '{name}' are {values.dtype} {values.shape} for {rows} images"
    return ""


def _part(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
