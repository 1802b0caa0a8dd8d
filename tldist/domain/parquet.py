"""A domain in Parquet files: image bytes or a path column, read by row through a bounded cache."""

from __future__ import annotations

import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tldist.domain.index import SPLITS, WHOLE, Domain, sort_names
from tldist.domain.recipe import DataRecipe
from tldist.errors import DomainError, MissingExtra, close_matches
from tldist.runtime.decode import BadImage, read_bytes

Label = str | tuple[str, ...] | None
"""The class of a row, its classes where the column holds lists, or none."""

CACHE_BYTES = 256 << 20
"""Image bytes that a process keeps of the row groups it read last."""


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "embed") from None
    return pyarrow.parquet


class ParquetSource:
    """Rows of Parquet files, in the order of files and rows."""

    def __init__(self, files: Sequence[Path], recipe: DataRecipe, ids: list[str] | None) -> None:
        self.files = list(files)
        self.recipe = recipe
        self._ids = ids
        self._groups: list[tuple[int, int]] = []  # (file, row group)
        self._starts: list[int] = []  # first row of each
        self._sizes: list[int] = []  # bytes of each
        self._firsts: list[int] = []  # first row of each file
        self._names = _names(self.files)
        self._rows = 0
        self._open: dict[int, Any] = {}
        self._cache: OrderedDict[int, tuple[list[Any], int]] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()  # an open Parquet file is not to be read by two threads at once
        for number, path in enumerate(self.files):
            meta = _pyarrow().read_metadata(path)
            self._firsts.append(self._rows)
            for group in range(meta.num_row_groups):
                self._groups.append((number, group))
                self._starts.append(self._rows)
                self._sizes.append(meta.row_group(group).total_byte_size)
                self._rows += meta.row_group(group).num_rows

    def __getstate__(self) -> dict[str, Any]:
        """Open files and cached bytes stay with their process."""
        return {**self.__dict__, "_open": {}, "_cache": OrderedDict(), "_cached_bytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def __len__(self) -> int:
        return self._rows

    def _place(self, row: int) -> tuple[int, int]:
        """(position in the list of row groups, row inside that group)."""
        group = bisect_right(self._starts, row) - 1
        return group, row - self._starts[group]

    def id(self, row: int) -> str:
        if self._ids is not None:
            return self._ids[row]
        number = self._groups[self._place(row)[0]][0]
        return f"{self._names[number]}:{row - self._firsts[number]}"

    def size(self, row: int) -> int:
        return self._sizes[self._place(row)[0]]

    def read(self, row: int) -> bytes:
        group, inside = self._place(row)
        with self._lock:
            value = self._load(group)[inside]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if value is None:
            raise BadImage("the image column is empty in this row")
        if isinstance(value, str):
            return read_bytes(self.files[self._groups[group][0]].parent / value)
        return bytes(value)

    def _load(self, group: int) -> list[Any]:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group][0]
        number, place = self._groups[group]
        if number not in self._open:
            self._open[number] = _pyarrow().ParquetFile(self.files[number])
        table = self._open[number].read_row_group(
            place, columns=[self.recipe.image_column], use_threads=False
        )
        column = table.column(0)
        values, size = column.to_pylist(), column.nbytes
        self._cache[group] = (values, size)
        self._cached_bytes += size
        while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
            _, (_, freed) = self._cache.popitem(last=False)
            self._cached_bytes -= freed
        return values


def _names(files: Sequence[Path]) -> list[str]:
    """File names, with as much of their folders as tells them apart."""
    if len({file.name for file in files}) == len(files):
        return [file.name for file in files]
    common = os.path.commonpath([file.parent.absolute() for file in files])
    return [file.absolute().relative_to(common).as_posix() for file in files]


def open_parquet(files: Sequence[Path], recipe: DataRecipe) -> Domain:
    """Index Parquet files: everything but the images is read now, the images when asked for.

    Raises:
        DomainError: no rows, no image column, unreadable files, ids that repeat.
    """
    parquet = _pyarrow()
    labels: list[Label] = []
    splits: list[str] = []
    ids: list[str] | None = []
    for path in files:
        try:
            schema = parquet.read_schema(path)
            if recipe.image_column not in schema.names:
                hint = close_matches(recipe.image_column, schema.names)
                raise DomainError(
                    f"{path}: no column '{recipe.image_column}' with images; set data.image_column. {hint}"
                )
            wanted = [recipe.label_column, recipe.id_column, recipe.split_column]
            table = parquet.read_table(path, columns=[name for name in wanted if name in schema.names])
            count = parquet.read_metadata(path).num_rows
        except (OSError, ValueError) as error:
            raise DomainError(f"{path}: cannot be read as Parquet: {error}") from error
        labels += _labels(table, schema, recipe.label_column, count)
        splits += _splits(table, recipe.split_column, path, count)
        if ids is not None and recipe.id_column in table.column_names:
            ids += [str(value) for value in table.column(recipe.id_column).to_pylist()]
        else:
            ids = None
    if not labels:
        raise DomainError(f"{recipe.path}: the Parquet files have no rows.")
    if ids is not None and len(set(ids)) < len(ids):
        raise DomainError(f"{recipe.path}: values repeat in '{recipe.id_column}'; set data.id_column.")
    several = [label for label in labels if isinstance(label, tuple)]
    if several and len(several) < len(labels):
        raise DomainError(
            f"{recipe.path}: {len(labels) - len(several)} of {len(labels)} rows have no list of classes in "
            f"'{recipe.label_column}', though others have. Give an empty list to an image without any class."
        )
    names = (name for label in labels for name in ([label] if isinstance(label, str) else label or ()))
    classes = sort_names(names)
    position = {name: place for place, name in enumerate(classes)}
    tags = np.zeros((len(several), len(classes)), dtype=bool)
    for row, names_here in enumerate(several):
        tags[row, [position[name] for name in names_here]] = True
    return Domain(
        name=recipe.path,
        source=ParquetSource(files, recipe, ids),
        rows=np.arange(len(labels), dtype=np.int64),
        labels=np.array([position[label] if isinstance(label, str) else -1 for label in labels], np.int32),
        classes=classes,
        splits=np.array(splits),
        tags=tags if several else None,
    )


def _labels(table: Any, schema: Any, column: str, count: int) -> list[Label]:
    if column not in table.column_names:
        return [None] * count
    names = _class_names(schema, column)

    def name_of(value: Any) -> str | None:
        if value is None or (names and value < 0):
            return None
        return names[value] if names else str(value)

    return [
        tuple(name for name in map(name_of, value) if name is not None)
        if isinstance(value, list)
        else name_of(value)
        for value in table.column(column).to_pylist()
    ]


def _class_names(schema: Any, column: str) -> list[str] | None:
    """The class names that Hugging Face's ``datasets`` stores in the schema beside a column of numbers, or of
    lists of numbers."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if not stored:
        return None
    try:
        feature = json.loads(stored)["info"]["features"][column]
        names = feature.get("feature", feature)["names"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return [str(name) for name in names]


def _splits(table: Any, column: str, path: Path, count: int) -> list[str]:
    if column in table.column_names:
        values = [str(value) for value in table.column(column).to_pylist()]
        return [SPLITS.get(value.lower(), value) for value in values]
    start = path.stem.lower().replace("_", "-").split("-")[0]
    return [SPLITS.get(start, WHOLE)] * count
