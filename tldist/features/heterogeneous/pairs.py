"""Which samples of two domains belong together: a file of pairs, or the ids that both domains have."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tldist.errors import DomainError, close_matches, needs
from tldist.progress import warn

COLUMNS = ("source", "target")


@dataclass(frozen=True)
class Pairs:
    """Positions of samples that belong together.

    Attributes:
        source, target: int64 (P,), positions in the ids that were given.
    """

    source: np.ndarray
    target: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The pairs of ids in a CSV or Parquet file with the columns ``source`` and ``target``.

    Raises:
        DomainError: no such file, other columns, an empty cell, or an id that occurs twice in its column.
    """
    if not path.is_file():
        raise DomainError(f"pairs={path}: no such file.")
    rows = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path)
    if not rows:
        raise DomainError(f"pairs={path}: no pairs in it.")
    for place, column in enumerate(COLUMNS):
        seen: dict[str, int] = {}
        for number, row in enumerate(rows, 1):
            if not row[place]:
                raise DomainError(f"pairs={path}: pair {number} has no {column} id.")
            if row[place] in seen:
                raise DomainError(
                    f"pairs={path}: the {column} id '{row[place]}' occurs twice, in the pairs "
                    f"{seen[row[place]]} and {number}. Each sample may have one partner."
                )
            seen[row[place]] = number
    return rows


def match_pairs(
    pairs: Iterable[tuple[str, str]], source: Sequence[str], target: Sequence[str], what: str = "pairs"
) -> Pairs:
    """The positions of pairs of ids.

    Args:
        pairs: (source id, target id).
        source, target: the ids of both domains, by position.
        what: where the pairs come from, for messages.

    Raises:
        DomainError: an id that its domain does not have, with the close ones.
    """
    listed = list(pairs)
    positions = []
    for place, (column, ids) in enumerate(zip(COLUMNS, (source, target))):
        known = {name: position for position, name in enumerate(ids)}
        missing = [pair[place] for pair in listed if pair[place] not in known]
        if missing:
            raise DomainError(
                f"{what}: {len(missing)} of {len(listed)} {column} ids are not in the {column} domain, the "
                f"first is '{missing[0]}'. {close_matches(missing[0], known)}"
            )
        positions.append(np.array([known[pair[place]] for pair in listed], dtype=np.int64))
    return Pairs(*positions)


def match_same_ids(source: Sequence[str], target: Sequence[str]) -> Pairs:
    """Pair the samples that have one id in both domains, in the order of the source.

    Raises:
        DomainError: no id is in both.
    """
    known = {name: position for position, name in enumerate(target)}
    shared = [(position, known[name]) for position, name in enumerate(source) if name in known]
    if not shared:
        raise DomainError(
            f"no id is in both domains (the first ones: '{source[0] if source else ''}' and "
            f"'{target[0] if target else ''}'). Name the pairs in a file: pairs=FILE with the columns source "
            f"and target."
        )
    first, second = np.array(shared, dtype=np.int64).T
    return Pairs(first, second)


def rows_of_pairs(pairs: Pairs, source_indices: np.ndarray, target_indices: np.ndarray) -> Pairs:
    """Where the pairs' features are; pairs with a broken image are left out, and said to be.

    Args:
        pairs: positions in the domains.
        source_indices, target_indices: int64, the domain's position of each row of features.

    Raises:
        DomainError: none is left.
    """
    rows = []
    for wanted, indices in ((pairs.source, source_indices), (pairs.target, target_indices)):
        place = {int(index): row for row, index in enumerate(indices)}
        rows.append(np.array([place.get(int(index), -1) for index in wanted], dtype=np.int64))
    whole = (rows[0] >= 0) & (rows[1] >= 0)
    if not whole.any():
        raise DomainError(f"none of the {len(pairs):,} pairs has features of both its images.")
    if not whole.all():
        missing = int((~whole).sum())
        warn(f"{missing:,} of {len(pairs):,} pairs are left out: an image of theirs has no features")
    return Pairs(rows[0][whole], rows[1][whole])


def _read_csv(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, strict=True)
            _check_columns(path, list(reader.fieldnames or []))
            return [(_cell(path, row, "source"), _cell(path, row, "target")) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DomainError(f"pairs={path}: cannot be read as CSV: {error}.") from error


def _cell(path: Path, row: dict[str, str], column: str) -> str:
    if None in row:  # where the csv module keeps cells without a name
        raise DomainError(
            f"pairs={path}: a line has more cells than the first line has names: {list(row.values())}. An id "
            f"with a comma in it needs quotes."
        )
    return row[column] or ""


def _read_parquet(path: Path) -> list[tuple[str, str]]:
    with needs("embed"):
        import pyarrow as pa
        import pyarrow.parquet as pq
    try:
        _check_columns(path, pq.read_schema(path).names)
        table = pq.read_table(path, columns=list(COLUMNS))
    except (OSError, pa.ArrowException) as error:
        raise DomainError(f"pairs={path}: cannot be read as Parquet: {error}.") from error
    columns = [["" if v is None else str(v) for v in table[name].to_pylist()] for name in COLUMNS]
    return list(zip(*columns))


def _check_columns(path: Path, found: list[str]) -> None:
    if not set(COLUMNS) <= set(found):
        raise DomainError(
            f"pairs={path}: its columns are {', '.join(found) or '(none)'}; expected source and target, the "
            f"ids of the two samples of a pair (a CSV file names them in its first line)."
        )
