"""Batches of a unit, read and decoded by threads ahead of the model."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from tldist.domain import Domain
from tldist.process import core_count
from tldist.runtime.decode import BadImage
from tldist.runtime.preprocess import Preprocessing, prepare

CHUNK = 8
"""Images that a thread decodes at a time: enough to make its start cheap, few enough to share a batch."""


@dataclass(frozen=True)
class BatchPlan:
    """One batch; it never crosses a unit's border.

    Attributes:
        unit: the unit it belongs to.
        rows: positions in the domain.
        last: whether it closes the unit.
    """

    unit: int
    rows: range
    last: bool


@dataclass(frozen=True)
class Decoded:
    """A batch, decoded.

    Attributes:
        plan: what it holds.
        images: uint8 (B, H, W, 3), always a full batch; zeros after the plan's rows and for broken images.
        bad: (place in the batch, reason) of the broken images.
    """

    plan: BatchPlan
    images: np.ndarray
    bad: list[tuple[int, str]]


def cut_batches(unit: int, rows: range, batch_size: int) -> Iterator[BatchPlan]:
    """The batches of one unit, in order."""
    for start in range(0, len(rows), batch_size):
        yield BatchPlan(unit, rows[start : start + batch_size], start + batch_size >= len(rows))


def decoding_threads(asked: int | None, processes_here: int) -> int:
    """Threads that decode in each of the processes of this host."""
    if asked is not None:
        return asked
    cores = core_count()
    return min(32, max(1, cores // max(1, processes_here)))


class Decoder:
    """A pool of threads (Pillow computes without the interpreter's lock) that decodes whole batches."""

    def __init__(self, domain: Domain, how: Preprocessing, batch_size: int, threads: int) -> None:
        self.domain, self.how, self.batch_size = domain, how, batch_size
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.ahead = 1 + math.ceil(2 * threads * CHUNK / batch_size)

    def batches(self, plans: Iterable[BatchPlan | None]) -> Iterator[Decoded | None]:
        """Decode ``plans`` in order, a bounded number of them ahead of what has been taken.

        A plan of None is handed on, after everything before it.
        """
        window: deque[_Pending] = deque()
        for plan in plans:
            if plan is None:
                yield from _drain(window)
                yield None
                continue
            window.append(self._submit(plan))
            if len(window) > self.ahead:
                yield window.popleft().result()
        yield from _drain(window)

    def _submit(self, plan: BatchPlan) -> _Pending:
        images = np.zeros((self.batch_size, self.how.height, self.how.width, 3), dtype=np.uint8)
        starts = range(0, len(plan.rows), CHUNK)
        parts = [self.pool.submit(self._decode, plan.rows[s : s + CHUNK], s, images) for s in starts]
        return _Pending(plan, images, parts)

    def _decode(self, rows: range, first: int, images: np.ndarray) -> list[tuple[int, str]]:
        """Fill ``images[first:]`` with a few rows; returns (place, reason) of the broken ones."""
        bad = []
        for place, row in enumerate(rows, first):
            try:
                images[place] = prepare(self.domain.read(row), self.how)
            except BadImage as reason:
                bad.append((place, str(reason)))
        return bad


@contextmanager
def decoder(domain: Domain, how: Preprocessing, batch_size: int, threads: int) -> Iterator[Decoder]:
    """A decoder that drops what it has not begun when its user leaves, for whatever reason."""
    made = Decoder(domain, how, batch_size, threads)
    try:
        yield made
    finally:
        made.pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class _Pending:
    plan: BatchPlan
    images: np.ndarray
    parts: list[Future[list[tuple[int, str]]]]

    def result(self) -> Decoded:
        return Decoded(self.plan, self.images, [bad for part in self.parts for bad in part.result()])


def _drain(window: deque[_Pending]) -> Iterator[Decoded]:
    while window:
        yield window.popleft().result()
