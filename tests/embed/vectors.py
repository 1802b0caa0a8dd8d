"""Reading what `tldist embed` writes, with nothing but pyarrow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def read_all(out: Path) -> pa.Table:
    """All parts, in the order of their names."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(out.glob("*.parquet"))])


def matrix(table: pa.Table) -> np.ndarray:
    """The column of vectors as (N, D)."""
    return np.stack(table["embedding"].to_numpy(zero_copy_only=False))
