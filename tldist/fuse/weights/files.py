"""Weights on disk: which tensors a model's safetensors files hold, and where; read piece by piece.

The library that reads safetensors maps whole files; a merge of models larger than memory reads them with
``preadv`` into buffers that are used again. The library still checks each file's header.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from tldist.bundle import WEIGHTS, find_bundle, is_bundle
from tldist.errors import BundleError
from tldist.files import read_json

INDEX = f"{WEIGHTS}.index.json"
_PLAIN = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "C64": "<c8",
}  # fmt: skip
_SMALL = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FLOATING = frozenset({"F64", "F32", "F16", *_SMALL})
"""safetensors' names of the types that are merged as numbers."""


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy type of a safetensors type; those that NumPy lacks come from ml_dtypes.

    Raises:
        BundleError: a type that cannot be read here.
    """
    if name in _PLAIN:
        return np.dtype(_PLAIN[name])
    if name in _SMALL:
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, _SMALL[name]))
    known = ", ".join([*_PLAIN, *_SMALL])
    raise BundleError(f"tensors of type {name} cannot be merged (known: {known}).")


@dataclass(frozen=True)
class Slot:
    """What a tensor is, without its numbers.

    Attributes:
        name: of the tensor.
        dtype: safetensors' name of its type.
        shape: of the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one of them."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """That it takes."""
        return self.size * self.itemsize


@dataclass(frozen=True)
class Entry(Slot):
    """One tensor in a file.

    Attributes:
        file: that holds it.
        offset: of its first byte in the file.
    """

    file: Path
    offset: int


@dataclass(frozen=True)
class Weights:
    """The tensors of one model, by name, in the order in which they lie in its files.

    Attributes:
        label: as it was asked for.
        entries: where each tensor is.
    """

    label: str
    entries: Mapping[str, Entry]

    @property
    def files(self) -> list[Path]:
        """The files that hold them, each once."""
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(entry.bytes for entry in self.entries.values())


def open_weights(path: str | os.PathLike[str]) -> Weights:
    """Find the tensors of a model; nothing but headers is read.

    Args:
        path: a safetensors file; a folder with ``model.safetensors.index.json`` (shards), with
            ``model.safetensors``, or with one safetensors file; a bundle, or a run that holds one.

    Raises:
        BundleError: none of these, a damaged file, an index that names what is not there.
    """
    place, label = Path(path), str(path)
    if place.is_dir() and not is_bundle(place) and is_bundle(place / "bundle"):
        place = find_bundle(place)
    if place.is_file():
        return Weights(label, read_header(place))
    if not place.is_dir():
        raise BundleError(f"{path}: no such file or folder (expected safetensors).")
    if (place / INDEX).is_file():
        return Weights(label, _read_shards(place))
    found = [place / WEIGHTS] if (place / WEIGHTS).is_file() else sorted(place.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found[:5]) or "none"
        raise BundleError(f"{path}: expected {WEIGHTS}, {INDEX} or one safetensors file; found {names}.")
    return Weights(label, read_header(found[0]))


def _read_shards(folder: Path) -> dict[str, Entry]:
    index = read_json(folder / INDEX, BundleError, "index of safetensors shards")
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise BundleError(f"{folder / INDEX}: expected a weight_map of tensor names to file names.")
    entries: dict[str, Entry] = {}
    for shard in dict.fromkeys(table.values()):
        if Path(shard).name != shard:
            raise BundleError(f"{folder / INDEX}: the file name '{shard}' points outside of the folder.")
        held = read_header(folder / shard)
        entries |= {name: entry for name, entry in held.items() if table.get(name) == shard}
    missing = sorted(table.keys() - entries.keys())
    if missing:
        raise BundleError(f"{folder / INDEX}: '{missing[0]}' is not in the file that the index names for it.")
    return entries


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        BundleError: missing, or not whole safetensors.
    """
    try:
        with safe_open(file, framework="numpy"):  # checks sizes, types, overlaps and the end of the file
            pass
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{file}: missing, damaged or truncated safetensors: {error}.") from error
    header.pop("__metadata__", None)
    rows = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Entry(name, row["dtype"], tuple(row["shape"]), file, 8 + length + row["data_offsets"][0])
        for name, row in rows
    }


class Reader:
    """Open files, read at any place by any thread."""

    def __init__(self) -> None:
        self._handles: dict[Path, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def open(self, weights: Weights) -> None:
        """Open the files of a model; before any thread reads."""
        for file in weights.files:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)

    def read_into(self, entry: Entry, start: int, into: NDArray[Any]) -> None:
        """Fill an array with the entries ``start`` .. of a tensor, in the tensor's own type.

        Raises:
            BundleError: the file has become shorter than it was.
        """
        left = into.reshape(-1).view(np.uint8).data
        place = entry.offset + start * entry.itemsize
        while left:
            done = os.preadv(self._handles[entry.file], [left], place)
            if done == 0:
                raise BundleError(f"{entry.file}: ends within '{entry.name}'; it was changed meanwhile.")
            left, place = left[done:], place + done

    def read(self, entry: Entry) -> NDArray[Any]:
        """A whole tensor in its own type."""
        array = np.empty(entry.shape, numpy_dtype(entry.dtype))
        self.read_into(entry, 0, array)
        return array
