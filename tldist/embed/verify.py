"""Is a folder of vectors complete and undamaged? Row counts and SHA-256 of every unit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tldist.embed.layout import Manifest, done_units, part_path, read_manifest, read_record
from tldist.errors import RecipeError
from tldist.files import sha256_file
from tldist.progress import progress_bar
from tldist.runs import Outcome

SHOWN = 10
"""Problems that are listed one by one."""


def verify_folder(folder: Path) -> Outcome:
    """Check every unit against its record; the comparison goes on after a difference.

    Raises:
        RecipeError: it is not a folder of vectors.
    """
    manifest = read_manifest(folder)
    done = done_units(folder)
    missing = [unit for unit in range(manifest.units) if unit not in done]
    problems = [f"{len(missing)} of {manifest.units} units missing"] if missing else []
    problems += [f"{name}: not a part of this folder" for name in _strangers(folder, manifest)]
    rows = bad = 0
    with progress_bar(len(done), "unit", "verify") as bar:
        for unit in sorted(done):
            found, broken, unit_problems = _check_unit(folder, manifest, unit)
            rows, bad = rows + found, bad + broken
            problems += unit_problems
            bar.update(1)
    values = {"rows": rows, "bad": bad, "units": manifest.units, "problems": problems}
    return Outcome("embed", folder, values, _text(folder, rows, bad, problems), passed=not problems)


def _strangers(folder: Path, manifest: Manifest) -> Iterator[str]:
    known = {part_path(folder, unit).name for unit in range(manifest.units)}
    yield from sorted(path.name for path in folder.rglob("*.parquet") if path.name not in known)


def _check_unit(folder: Path, manifest: Manifest, unit: int) -> tuple[int, int, list[str]]:
    """(vectors, broken images, what is wrong) of one unit."""
    path = part_path(folder, unit)
    if unit >= manifest.units:
        return 0, 0, [f"unit {unit}: the manifest has only {manifest.units} units"]
    try:
        record = read_record(folder, unit)
    except RecipeError as error:
        return 0, 0, [str(error)]
    if not path.is_file():
        return 0, len(record.bad), [f"{path.name}: missing, though its record is there"]
    problems = []
    if sha256_file(path) != record.sha256:
        problems.append(f"{path.name}: SHA-256 differs from its record (damaged or changed)")
    rows = _num_rows(path)
    if rows != record.rows:
        problems.append(
            f"{path.name}: {'unreadable' if rows is None else f'{rows} rows'}, expected {record.rows}"
        )
    if record.rows + len(record.bad) != len(manifest.rows_of(unit)):
        counts = f"{record.rows} vectors and {len(record.bad)} broken images"
        problems.append(f"unit {unit}: {counts}, expected {len(manifest.rows_of(unit))} together")
    return rows or 0, len(record.bad), problems


def _num_rows(path: Path) -> int | None:
    try:
        return int(pq.read_metadata(path).num_rows)
    except (OSError, pa.ArrowException):
        return None


def _text(folder: Path, rows: int, bad: int, problems: list[str]) -> str:
    if not problems:
        return f"verify: PASS ({rows:,} vectors, {bad} broken images, every SHA-256 as recorded)"
    more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    listed = "\n".join(f"  {line}" for line in [*problems[:SHOWN], *more])
    advice = (
        "Remove the record in units/ of a damaged unit and run the embedding again: it is then done anew."
    )
    return f"verify: FAIL\n{listed}\n{advice}"
