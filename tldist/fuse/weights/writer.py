"""The merged weights on disk: the headers first, then each tensor at its place, by any thread or process."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from tldist.bundle import WEIGHTS
from tldist.files import start_writing_back, write_json
from tldist.fuse.weights.files import INDEX, Entry, Slot, numpy_dtype

_ALIGNMENT = 8


def lay_out(
    folder: Path, slots: Sequence[Slot], metadata: Mapping[str, str], shard_bytes: int | None = None
) -> tuple[dict[str, Entry], dict[Path, bytes]]:
    """Where each tensor goes: one file, or shards of at most so many bytes (a larger tensor has its own).

    Args:
        folder: that the files are in.
        slots: the tensors, in the order in which they shall be read.
        metadata: of each file's header.
        shard_bytes: the most that one file holds; None: all in ``model.safetensors``.

    Returns:
        The entry of each tensor, and the bytes with which each file begins.
    """
    shards: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if shard_bytes is not None and shards[-1] and filled + slot.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(slot)
        filled += slot.bytes
    entries: dict[str, Entry] = {}
    beginnings: dict[Path, bytes] = {}
    for number, shard in enumerate(shards, 1):
        many = len(shards) > 1
        file = folder / (f"model-{number:05}-of-{len(shards):05}.safetensors" if many else WEIGHTS)
        beginnings[file] = _place(file, shard, metadata, entries)
    return entries, beginnings


def _place(
    file: Path, slots: Sequence[Slot], metadata: Mapping[str, str], entries: dict[str, Entry]
) -> bytes:
    """Note the entries of one file; its header, padded."""
    # The widest types first, as the library does: every tensor is aligned then.
    ordered = sorted(slots, key=lambda slot: -slot.itemsize)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    end = 0
    for slot in ordered:
        offsets[slot.name] = end
        header[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [end, end + slot.bytes],
        }
        end += slot.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    beginning = struct.pack("<Q", len(text)) + text
    for slot in ordered:
        offset = len(beginning) + offsets[slot.name]
        entries[slot.name] = Entry(slot.name, slot.dtype, slot.shape, file, offset)
    return beginning


def create_files(entries: Mapping[str, Entry], beginnings: Mapping[Path, bytes]) -> None:
    """Make the files in their whole length, with their headers (and the index of several)."""
    ends = dict.fromkeys(beginnings, 0)
    for entry in entries.values():
        ends[entry.file] = max(ends[entry.file], entry.offset + entry.bytes)
    for file, beginning in beginnings.items():
        file.write_bytes(beginning)
        os.truncate(file, max(ends[file], len(beginning)))
    if len(beginnings) > 1:
        total = sum(entry.bytes for entry in entries.values())
        table = {name: entry.file.name for name, entry in entries.items()}
        folder = next(iter(beginnings)).parent
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})


class Writer:
    """The files of a layout, written at any place by any thread; they exist already."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = entries
        files = dict.fromkeys(entry.file for entry in entries.values())
        self._handles = {file: os.open(file, os.O_WRONLY) for file in files}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)

    def write(self, name: str, start: int, values: NDArray[Any]) -> None:
        """Write entries of a tensor from ``start`` on, in the type that was laid out."""
        entry = self.entries[name]
        whole = np.ascontiguousarray(values, dtype=numpy_dtype(entry.dtype))
        left = whole.reshape(-1).view(np.uint8).data
        begin = place = entry.offset + start * entry.itemsize
        handle = self._handles[entry.file]
        while left:
            done = os.pwrite(handle, left, place)
            left, place = left[done:], place + done
        start_writing_back(handle, begin, place - begin)
