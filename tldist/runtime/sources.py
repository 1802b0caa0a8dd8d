"""Running a package on pictures from anywhere: threads decode ahead while the graph runs.

Pictures of different sizes, which a package of input ``picture`` takes, cannot share a batch: they wait in a
queue for each size.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from PIL import Image

from tldist.process import core_count
from tldist.runtime.decode import BadImage, read_bytes
from tldist.runtime.package import Package, PackageConfig
from tldist.runtime.preprocess import fit, prepare, prepare_picture

Source = str | os.PathLike[str] | bytes | np.ndarray
"""A path, the bytes of an image file, or a decoded picture: uint8 (H, W, 3), RGB, of any size."""

MOST_WORKERS = 4
"""Threads that decode where nobody says how many; more seldom keep up better with one graph."""
_MOST_WAITING = 256 * 2**20
"""Bytes of pictures that wait for others of their size, before they run in smaller batches."""


@dataclass(frozen=True)
class Answer:
    """What the graph says about some of the sources.

    Attributes:
        places: positions of the sources, in rising order.
        outputs: float32 (len(places), D) of each output, by name; empty where there are no places.
        bad: position and error of each source that could not be decoded.
    """

    places: tuple[int, ...] = ()
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    bad: tuple[tuple[int, BadImage], ...] = ()


def run_sources(
    package: Package,
    sources: Sequence[Source],
    *,
    batch_size: int = 32,
    workers: int | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> Iterator[Answer]:
    """Decode and run; every source is in one answer, batch by batch.

    Args:
        package: that runs.
        sources: paths, bytes or arrays, in any mixture.
        batch_size: pictures that run at once.
        workers: threads that decode while the graph runs; 0: none; None: by the number of cores.
        errors: ``raise`` the first source that cannot be decoded, or ``return`` its error.

    Raises:
        BadImage: a source cannot be decoded; the message names it.
        ValueError: a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    queues: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    waiting = 0
    ahead = batch_size if package.config.input == "picture" else 2 * batch_size  # pictures may be large
    for place, image in _decoded(package.config, sources, ahead, workers):
        if isinstance(image, BadImage):
            if errors == "raise":
                raise image
            yield Answer(bad=((place, image),))
            continue
        queue = queues.setdefault(image.shape, [])
        queue.append((place, image))
        waiting += image.nbytes
        if len(queue) == batch_size or waiting > _MOST_WAITING:
            full = image.shape if len(queue) == batch_size else max(queues, key=lambda s: _bytes(queues[s]))
            waiting -= _bytes(queues[full])
            yield _run(package, queues.pop(full))
    for queue in queues.values():
        yield _run(package, queue)


def read_source(source: Source, config: PackageConfig, name: str = "the image") -> np.ndarray:
    """A picture as a package's graph takes it.

    Args:
        source: a path, bytes, or an array.
        config: of the package.
        name: what to call bytes and arrays in an error.

    Returns:
        uint8 (H, W, 3), RGB: resized and cropped, or whole where the graph does that itself.

    Raises:
        BadImage: it cannot be decoded; the message names it.
    """
    how, whole = config.preprocessing, config.input == "picture"
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise BadImage(f"{name}: expected uint8 (H, W, 3), found {source.dtype} {source.shape}")
        return source if whole else fit(Image.fromarray(source), how)
    try:
        if not isinstance(source, bytes):
            name = os.fspath(source)
            source = read_bytes(source)
        return prepare_picture(source, how) if whole else prepare(source, how)
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from error


def _decoded(
    config: PackageConfig, sources: Sequence[Source], ahead: int, workers: int | None
) -> Iterator[tuple[int, np.ndarray | BadImage]]:
    """Each source's position and picture, in order, at most ``ahead`` of them before they are asked for."""

    def read(place: int) -> np.ndarray | BadImage:
        try:
            return read_source(sources[place], config, f"source {place}")
        except BadImage as error:
            return error

    count = min(MOST_WORKERS, core_count()) if workers is None else workers
    if count < 1 or len(sources) < 2:
        yield from ((place, read(place)) for place in range(len(sources)))
        return
    with ThreadPoolExecutor(count, "decode") as pool:
        yield from _in_order(pool, read, len(sources), ahead)


def _in_order(
    pool: ThreadPoolExecutor, read: Callable[[int], np.ndarray | BadImage], total: int, ahead: int
) -> Iterator[tuple[int, np.ndarray | BadImage]]:
    pending: deque[Future[np.ndarray | BadImage]] = deque()
    submitted = 0
    try:
        for place in range(total):
            while submitted < total and len(pending) < ahead:
                pending.append(pool.submit(read, submitted))
                submitted += 1
            yield place, pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _run(package: Package, queue: list[tuple[int, np.ndarray]]) -> Answer:
    outputs = package.run(np.stack([image for _, image in queue]))
    return Answer(tuple(place for place, _ in queue), outputs)


def _bytes(queue: list[tuple[int, np.ndarray]]) -> int:
    return sum(image.nbytes for _, image in queue)
