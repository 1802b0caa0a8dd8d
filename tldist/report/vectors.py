"""The section of a folder of vectors: counts, and a map of their two main directions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tldist import pictures
from tldist.domain import natural_key
from tldist.errors import RecipeError, needs
from tldist.report.page import Picture, Section
from tldist.report.text import facts, name_of, read_mapping, read_settings
from tldist.runs import SUMMARY

MOST_VECTORS = 2000
"""Vectors on the map, spread evenly over the folder."""
_NAMES = ("rows", "bad", "dimensions", "dtype", "engine", "units", "seconds", "finished_at", "host", "tldist")
_WORDS = {"rows": "vectors", "bad": "broken images"}


def read_vectors(folder: Path) -> Section:
    """Read a folder of vectors; it may be incomplete.

    Raises:
        RecipeError: its manifest, its summary or a Parquet file is damaged.
    """
    manifest = read_mapping(folder / "manifest.json", "manifest of a folder of vectors")
    there = (folder / SUMMARY).is_file()
    summary = read_mapping(folder / SUMMARY, "run summary") if there else {}
    status = str(summary.get("status", "unfinished"))
    # A part without its record in units/ is one that a killed process did not commit.
    parts = [path for path in _parts(folder) if (folder / "units" / f"{path.stem[5:]}.json").is_file()]
    known = [(_WORDS.get(name, name), value) for name, value in facts(summary, _NAMES)]
    return Section(
        title=name_of(folder),
        kind="vectors",
        path=str(folder),
        status=status,
        good={"done": True, "failed": False}.get(status),
        headline=f"{summary['rows']:,} vectors" if isinstance(summary.get("rows"), int) else "",
        facts=known or facts(manifest, ("rows", "units")),
        notes=list(_notes(manifest, summary, len(parts))),
        pictures=list(_map(parts)),
        settings=read_settings(folder),
    )


def _parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*.parquet"), key=lambda path: natural_key(path.name))


def _notes(manifest: dict[str, Any], summary: dict[str, Any], parts: int) -> Iterator[str]:
    if summary.get("reason"):
        yield str(summary["reason"])
    if parts != manifest.get("units"):
        yield f"{parts} of {manifest.get('units')} units are done; the same command goes on."


def _map(parts: list[Path]) -> Iterator[Picture]:
    vectors, labels = sample_vectors(parts, MOST_VECTORS)
    if len(vectors) < 3 or vectors.shape[1] < 2:
        return
    points, share = principal_plane(vectors)
    colored = f", coloured by their {len(set(labels))} labels" if labels else ""
    caption = (
        f"{len(vectors):,} vectors{colored}, on their first two principal components, "
        f"which hold {share:.1%} of the variance"
    )
    yield Picture(pictures.plane(points, labels), caption)


def sample_vectors(parts: list[Path], most: int) -> tuple[np.ndarray, list[str] | None]:
    """At most ``most`` vectors, spread evenly over the parts, read part by part.

    Returns:
        float64 (N, D), and a label for each, or None where there are no labels.
    """
    with needs("embed"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    vectors: list[np.ndarray] = []
    labels: list[str] = []
    try:
        counts = [pq.read_metadata(path).num_rows for path in parts]
        starts = np.cumsum([0, *counts])
        chosen = np.unique(np.linspace(0, starts[-1] - 1, min(most, starts[-1])).round().astype(int))
        for path, start, end in zip(parts, starts, starts[1:]):
            rows = chosen[(chosen >= start) & (chosen < end)] - start
            if not len(rows):
                continue
            names = [name for name in pq.read_schema(path).names if name in ("embedding", "label")]
            table = pq.read_table(path, columns=names).take(rows)
            vectors += [np.asarray(vector, dtype=np.float64) for vector in table["embedding"].to_numpy()]
            if "label" in names:
                labels += ["(none)" if name is None else name for name in table["label"].to_pylist()]
    except (OSError, pa.ArrowException, KeyError) as error:
        raise RecipeError(f"{parts[0].parent}: its Parquet files cannot be read: {error}") from error
    if not vectors:
        return np.zeros((0, 0)), None
    return np.stack(vectors), labels if len(labels) == len(vectors) else None


def principal_plane(vectors: np.ndarray) -> tuple[np.ndarray, float]:
    """The coordinates (N, 2) of vectors (N, D) on their first two principal components.

    Returns:
        The coordinates, each component's largest one positive, and the share of the variance that they hold.
    """
    centred = vectors - vectors.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    points = left[:, :2] * sizes[:2]
    signs = np.sign(points[np.abs(points).argmax(0), [0, 1]])  # SVD leaves the signs open
    total = float((sizes**2).sum())
    return points * np.where(signs == 0, 1, signs), float((sizes[:2] ** 2).sum()) / total if total else 1.0
