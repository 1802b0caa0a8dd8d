"""Vectors in files against the arrays that were written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tldist.errors import DomainError
from tldist.features.moments import moments_of
from tldist.features.vectors import vector_batches


def write(path: Path, values: np.ndarray, fixed: bool = True) -> Path:
    flat = pa.array(values.reshape(-1))
    width = values.shape[1]
    if fixed:
        lists: pa.Array = pa.FixedSizeListArray.from_arrays(flat, width)
    else:
        lists = pa.ListArray.from_arrays(pa.array(np.arange(len(values) + 1) * width, pa.int32()), flat)
    table = pa.table({"id": pa.array([str(i) for i in range(len(values))]), "embedding": lists})
    pq.write_table(table, path, row_group_size=7)
    return path


@pytest.mark.parametrize("kind", ["fixed", "lists", "npy"])
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_vector_batches__are_what_was_written(tmp_path: Path, kind: str, rows: int) -> None:
    values = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    files = []
    for number, part in enumerate(np.split(values, [11, 12])):
        if kind == "npy":
            files.append(tmp_path / f"{number}.npy")
            np.save(files[-1], part)
        else:
            files.append(write(tmp_path / f"{number}.parquet", part, kind == "fixed"))
    batches = list(vector_batches(files, rows=rows))
    assert max(map(len, batches)) <= rows
    assert batches[0].dtype == np.float32
    np.testing.assert_array_equal(np.concatenate(batches), values)
    shares = [b for rank in range(2) for b in vector_batches(files, rows=rows, rank=rank, size=2)]
    found = moments_of(shares)
    assert found is not None
    assert found.count == 40
    np.testing.assert_allclose(
        found.covariance.numpy(), np.cov(values.astype(float), rowvar=False), atol=1e-10
    )


def test_vector_batches__what_is_no_file_of_vectors(tmp_path: Path) -> None:
    with pytest.raises(DomainError, match="no such file"):
        next(vector_batches([tmp_path / "none.parquet"]))
    path = write(tmp_path / "a.parquet", np.ones((4, 2)))
    with pytest.raises(DomainError, match=r"no column 'vector' \(columns: id, embedding\)"):
        next(vector_batches([path], column="vector"))
    with pytest.raises(DomainError, match="no lists"):
        next(vector_batches([path], column="id"))
    pq.write_table(pa.table({"embedding": [[1.0], [1.0, 2.0]]}), tmp_path / "b.parquet")
    with pytest.raises(DomainError, match="equally long"):
        next(vector_batches([tmp_path / "b.parquet"]))
    pq.write_table(pa.table({"embedding": [[1.0], None]}), tmp_path / "c.parquet")
    with pytest.raises(DomainError, match="lacks some"):
        next(vector_batches([tmp_path / "c.parquet"]))
