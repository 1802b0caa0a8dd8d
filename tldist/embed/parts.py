"""A unit's vectors to its Parquet file, and the commit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tldist.domain import Domain
from tldist.embed.layout import Manifest, Record, part_path
from tldist.errors import ModelError, RecipeError
from tldist.files import atomic_file, sha256_file


def to_storage(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """float32 (N, D) to the stored type.

    Raises:
        ModelError: the model answered with NaN or infinity.
        RecipeError: a value is too large for float16.
    """
    if not np.isfinite(vectors).all():
        raise ModelError("the model gives NaN or infinity as features; check its weights and its precision.")
    with np.errstate(over="ignore"):  # said below, in words
        stored = vectors.astype(dtype)
    if not np.isfinite(stored).all():
        raise RecipeError(
            f"dtype={dtype}: features reach {np.abs(vectors).max():.4g}, which it cannot hold. "
            f"Use dtype=float32, in another out=."
        )
    return stored


def commit_unit(
    folder: Path, manifest: Manifest, unit: int, domain: Domain, vectors: np.ndarray, bad: dict[int, str]
) -> Record:
    """Write a unit's Parquet file, then its commit marker.

    Args:
        folder: the folder of vectors.
        manifest: its manifest.
        unit: the unit's number.
        domain: where ids, labels and splits come from.
        vectors: float32 (N, D), one for every row of the unit, in order; those of broken images are dropped.
        bad: positions in the domain of broken images, with the reason.

    Raises:
        ModelError, RecipeError: see `to_storage`.
    """
    rows = manifest.rows_of(unit)
    kept = np.array([row for row in rows if row not in bad], dtype=np.int64)
    stored = to_storage(vectors[kept - rows.start], str(manifest.inputs["dtype"]))
    table = _table(domain, kept, stored, manifest.fingerprint)
    path = part_path(folder, unit)
    with atomic_file(path) as temporary:
        _write_table(table, temporary, row_group_size=len(rows))
        digest = sha256_file(temporary)
    record = Record(unit, len(kept), digest, tuple((domain.id(row), bad[row]) for row in rows if row in bad))
    record.write(folder)
    return record


def _table(domain: Domain, rows: np.ndarray, vectors: np.ndarray, fingerprint: str) -> pa.Table:
    """Columns id, embedding, label (where the domain has labels), split."""
    flat = pa.array(vectors.reshape(-1))
    columns = {
        "id": pa.array([domain.id(row) for row in rows.tolist()], pa.string()),
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    if domain.classes:
        labels = domain.labels[rows].tolist()
        names = [domain.classes[label] if label >= 0 else None for label in labels]
        columns["label"] = pa.array(names, pa.string())
    columns["split"] = pa.array([str(name) for name in domain.splits[rows]], pa.string())
    return pa.table(columns).replace_schema_metadata({"tldist.fingerprint": fingerprint})


def _write_table(table: pa.Table, path: Path, row_group_size: int) -> None:
    # Vectors are noise to a compressor; the other columns repeat themselves.
    compression = {name: "ZSTD" for name in table.column_names if name != "embedding"}
    texts = [name for name in ("label", "split") if name in table.column_names]
    pq.write_table(
        table,
        path,
        compression={**compression, "embedding.list.element": "NONE"},
        use_dictionary=texts,
        write_statistics=["id"],
        row_group_size=row_group_size,
    )
