"""The merge of whole models: file to file, piece by piece, on all cores, shared among processes.

What is in memory at once: pieces of a fixed size, or one tensor of each model where the method must see it
whole first. The rest is on disk, however large the models are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tldist.fuse.weights.files import FLOATING, Entry, Reader, numpy_dtype
from tldist.fuse.weights.merge import check_finite_values, merge_by_policy, merge_rows
from tldist.fuse.weights.method import Piece
from tldist.fuse.weights.policy import MEAN, beside
from tldist.fuse.weights.targets import Fusion, Target, plan_targets, share_out
from tldist.fuse.weights.writer import Writer, create_files, lay_out
from tldist.process import core_count

_PIECE = 1 << 17
"""Entries merged at once: with a handful of models they fit into a core's cache."""
_BACKLOG = 16
"""Pieces handed to the threads ahead."""


def write_merged(
    fusion: Fusion,
    folder: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int | None = None,
    rank: int = 0,
    size: int = 1,
    together: Callable[[], None] = lambda: None,
    threads: int | None = None,
    advance: Callable[[int], object] = lambda done: None,
) -> None:
    """Merge models into ``folder/model.safetensors`` (or shards with an index).

    The caller makes the folder and moves it to its place when all processes are done.

    Args:
        fusion: what is merged.
        folder: exists; the same for all processes.
        metadata: for the headers of the files.
        shard_bytes: the most that one file holds; None: all in one.
        rank, size: of this process; each merges its own tensors.
        together: waits for all processes.
        threads: of this process; None: one a core.
        advance: told the bytes of the result that are done, as they are done.

    Raises:
        BundleError: the models do not fit together, or a file is damaged.
        ModelError: a merged number is not finite.
    """
    targets = plan_targets(fusion)
    entries, beginnings = lay_out(folder, [t.slot for t in targets], metadata or {}, shard_bytes)
    if rank == 0:
        create_files(entries, beginnings)
    together()
    mine = share_out(targets, rank, size)
    with Reader() as reader, Writer(entries) as writer, ThreadPoolExecutor(threads or core_count()) as pool:
        for weights in (*fusion.everyone, *fusion.aids):
            reader.open(weights)
        merger = _Merger(fusion, reader, writer, pool, advance)
        try:
            for target in mine:
                merger.merge(target)
            merger.settle(all_of_it=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    together()


class _Merger:
    """The work of one process: threads that read, merge and write pieces; the first error ends it.

    Args:
        fusion: what is merged.
        reader, writer: open files.
        pool: the threads.
        advance: told the bytes of the result that are done.
    """

    def __init__(
        self,
        fusion: Fusion,
        reader: Reader,
        writer: Writer,
        pool: ThreadPoolExecutor,
        advance: Callable[[int], object],
    ) -> None:
        self.fusion, self.reader, self.writer, self.pool, self.advance = fusion, reader, writer, pool, advance
        self._pending: set[Future[int]] = set()
        self._own = threading.local()
        self._wholes: dict[int, NDArray[Any]] = {}

    def merge(self, target: Target) -> None:
        """Hand the work on one tensor to the threads."""
        method = self.fusion.method
        if target.kind != "learned":
            self._submit(lambda: self._by_policy(target))
        elif target.slot.name in self.fusion.rows or method.whole or target.slot.size <= _PIECE:
            self._submit(lambda: self._at_once(target))
        elif method.survey is None:
            for start in range(0, target.slot.size, _PIECE):
                self._submit(partial(self._piece, target, start))
        else:
            self._surveyed(target)

    def settle(self, all_of_it: bool = False) -> None:
        """Wait until some of the work under way is done; or all of it."""
        while self._pending:
            done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            for future in done:
                self.advance(future.result())
            if not all_of_it:
                return

    def _submit(self, work: Callable[[], int]) -> None:
        self._pending.add(self.pool.submit(_quietly, work))
        if len(self._pending) >= _BACKLOG:
            self.settle()

    def _by_policy(self, target: Target) -> int:
        """Statistics, counters and constants: small, whole, in float64."""
        name, fusion = target.slot.name, self.fusion
        values = [self.reader.read(model.entries[name]) for model in fusion.everyone]
        means: list[NDArray[Any]] = []
        if target.kind == "running_var":
            means = [self.reader.read(model.entries[beside(name, MEAN)]) for model in fusion.everyone]
        return self._write(target, 0, merge_by_policy(name, target.kind, values, fusion.shares, means))

    def _at_once(self, target: Target) -> int:
        """A tensor that one thread merges as a whole."""
        fusion, name = self.fusion, target.slot.name
        wide = _wide(target)
        piece = Piece(
            name,
            [self.reader.read(model.entries[name]).astype(wide, copy=False) for model in fusion.models],
            self.reader.read(fusion.base.entries[name]).astype(wide, copy=False) if fusion.base else None,
            [self.reader.read(aid.entries[name]) for aid in fusion.aids if name in aid.entries],
        )
        rows = fusion.rows.get(name)
        if rows is not None:
            return self._write(target, 0, merge_rows(fusion.method, piece, fusion.settings, rows))
        return self._write(target, 0, fusion.method.apply(piece, fusion.settings))

    def _piece(self, target: Target, start: int) -> int:
        """A piece of a tensor whose entries are merged each for itself."""
        fusion, name = self.fusion, target.slot.name
        size = min(_PIECE, target.slot.size - start)
        sources = [model.entries[name] for model in fusion.everyone]
        sources += [aid.entries[name] for aid in fusion.aids if name in aid.entries]
        arrays = [self._read(number, entry, start, size, target) for number, entry in enumerate(sources)]
        first, last = len(fusion.everyone) - len(fusion.models), len(fusion.everyone)
        base = arrays[0] if first else None
        piece = Piece(name, arrays[first:last], base, arrays[last:], start)
        return self._write(target, start, fusion.method.merge(piece, fusion.settings, None))

    def _surveyed(self, target: Target) -> None:
        """A tensor that the method must see whole: read into buffers that are used again, by all threads."""
        fusion, name, method = self.fusion, target.slot.name, self.fusion.method
        assert method.survey is not None
        sources = [model.entries[name] for model in fusion.everyone]
        arrays = [self._buffer(number, target) for number in range(len(sources))]
        for _ in self.pool.map(lambda pair: self._fill(target, *pair), zip(sources, arrays)):
            pass
        first = len(arrays) - len(fusion.models)
        whole = Piece(name, arrays[first:], arrays[0] if first else None)
        with np.errstate(all="ignore"):
            facts = method.survey(whole, fusion.settings, self.pool.map)

        def work(start: int) -> int:
            part = slice(start, start + _PIECE)
            base = None if whole.base is None else whole.base[part]
            piece = Piece(whole.name, [model[part] for model in whole.models], base, start=start)
            return self._write(target, start, method.merge(piece, fusion.settings, facts))

        for start in range(0, target.slot.size, _PIECE):
            self._submit(partial(work, start))
        self.settle(all_of_it=True)  # the buffers are the next tensor's

    def _buffer(self, number: int, target: Target) -> NDArray[Any]:
        """One of the buffers for whole tensors, flat."""
        wide, held = _wide(target), self._wholes.get(number)
        if held is None or held.size < target.slot.size or held.dtype != wide:
            held = self._wholes[number] = np.empty(target.slot.size, wide)
        return held[: target.slot.size]

    def _fill(self, target: Target, entry: Entry, into: NDArray[Any]) -> None:
        for start in range(0, target.slot.size, _PIECE):
            part = into[start : start + _PIECE]
            if numpy_dtype(entry.dtype) == part.dtype:
                self.reader.read_into(entry, start, part)
            else:
                part[:] = self._read(0, entry, start, part.size, target)

    def _read(self, number: int, entry: Entry, start: int, size: int, target: Target) -> NDArray[Any]:
        """A piece of a tensor, in a buffer of this thread that the next piece uses again."""
        buffers: dict[tuple[int, str], NDArray[Any]] = self._own.__dict__.setdefault("buffers", {})
        key = (number, entry.dtype)
        if key not in buffers:
            buffers[key] = np.empty(_PIECE, numpy_dtype(entry.dtype))
        piece = buffers[key][:size]
        self.reader.read_into(entry, start, piece)
        return piece.astype(_wide(target), copy=False)

    def _write(self, target: Target, start: int, values: NDArray[Any]) -> int:
        if target.slot.dtype in FLOATING:
            check_finite_values(target.slot.name, values)
        self.writer.write(target.slot.name, start, values)
        return values.size * target.slot.itemsize


def _quietly(work: Callable[[], int]) -> int:
    """Without NumPy's warnings: what is not finite is refused where it is written."""
    with np.errstate(all="ignore"):
        return work()


def _wide(target: Target) -> np.dtype[Any]:
    """In which numbers a tensor is merged: float32, or float64 where a model has it."""
    return np.dtype(np.float64 if target.slot.dtype == "F64" else np.float32)
