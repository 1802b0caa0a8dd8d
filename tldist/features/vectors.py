"""Features that lie in files, batch by batch: what ``embed`` writes, other Parquet files, NumPy's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tldist.errors import DomainError


def vector_batches(
    files: Sequence[str | Path], *, column: str = "embedding", rows: int = 8192, rank: int = 0, size: int = 1
) -> Iterator[np.ndarray]:
    """The vectors of files, in their order, in bounded memory; for `tldist.features.moments.moments_of`.

    Args:
        files: Parquet files with a column of lists of equal length; or ``.npy`` files (N, D).
        column: of the Parquet files.
        rows: vectors at once.
        rank, size: this process and how many there are: each reads every so-manieth file.

    Yields:
        (n, D), n at most ``rows``, of the type that the file has.

    Raises:
        DomainError: a file does not exist, has no such column, or its lists are not equally long.
    """
    for path in map(Path, files[rank::size]):
        if not path.is_file():
            raise DomainError(f"{path}: no such file of vectors.")
        if path.suffix == ".npy":
            values = np.load(path, mmap_mode="r")
            for start in range(0, len(values), rows):
                yield np.asarray(values[start : start + rows])
        else:
            yield from _parquet_batches(path, column, rows)


def _parquet_batches(path: Path, column: str, rows: int) -> Iterator[np.ndarray]:
    with pq.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise DomainError(
                f"{path}: no column '{column}' (columns: {', '.join(file.schema_arrow.names)})."
            )
        for batch in file.iter_batches(rows, columns=[column]):
            yield _matrix(batch.column(0), path, column)


def _matrix(lists: pa.Array, path: Path, column: str) -> np.ndarray:
    """A column of lists as a matrix, without a copy where it has no gaps."""
    count = len(lists)
    if lists.null_count or not hasattr(lists, "flatten"):
        raise DomainError(f"{path}: '{column}' holds no lists, or lacks some; expected a vector in each row.")
    values: np.ndarray = lists.flatten().to_numpy(zero_copy_only=False)
    lengths = np.asarray(pc.list_value_length(lists))
    if count == 0 or (lengths != lengths[0]).any() or lengths[0] * count != len(values):
        raise DomainError(f"{path}: the lists in '{column}' are not equally long.")
    return values.reshape(count, -1)
