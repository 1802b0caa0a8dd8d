"""The folder of vectors on disk: its manifest, its units, their records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tldist.errors import RecipeError
from tldist.files import canonical_json, read_json, sha256_text, write_json

FORMAT = "tldist.embed/1"
MANIFEST = "manifest.json"
UNITS = "units"
LOCK = ".lock"

_NUMBERED = re.compile(r"(?:part-)?(\d+)\.(?:parquet|json)")
_LEFTOVER = re.compile(r"\.tmp-[0-9a-f]+-(.*)")


@dataclass(frozen=True)
class Manifest:
    """What a folder of vectors holds when it is complete; a function of the settings, model and data alone.

    Attributes:
        inputs: everything that a vector depends on, by name: model, engine, preprocessing, data, ...
        rows: images of the domain, the broken ones counted.
        unit_rows: images of every unit but the last, which may have fewer.
    """

    inputs: dict[str, Any]
    rows: int
    unit_rows: int

    @property
    def units(self) -> int:
        """Number of units."""
        return -(-self.rows // self.unit_rows)

    def rows_of(self, unit: int) -> range:
        """The positions in the domain that make a unit."""
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.rows))

    @property
    def fingerprint(self) -> str:
        """Hash of the inputs: vectors of two folders with one fingerprint can be mixed."""
        return sha256_text(canonical_json(self.inputs))

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        values = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "inputs": self.inputs,
            "rows": self.rows,
            "unit_rows": self.unit_rows,
            "units": self.units,
        }
        write_json(folder / MANIFEST, values)


@dataclass(frozen=True)
class Record:
    """What is known of a finished unit; its file in ``units/`` is the commit marker.

    Attributes:
        unit: its number.
        rows: vectors in its Parquet file.
        sha256: of that file.
        bad: (id, reason) of the images that could not be decoded; rows + bad are the unit's images.
    """

    unit: int
    rows: int
    sha256: str
    bad: tuple[tuple[str, str], ...] = ()

    def write(self, folder: Path) -> None:
        """Commit the unit."""
        bad = [{"id": name, "reason": reason} for name, reason in self.bad]
        values = {"unit": self.unit, "rows": self.rows, "sha256": self.sha256, "bad": bad}
        write_json(marker_path(folder, self.unit), values)


def part_path(folder: Path, unit: int) -> Path:
    """The Parquet file of a unit."""
    return folder / f"part-{unit:05d}.parquet"


def marker_path(folder: Path, unit: int) -> Path:
    """The commit marker of a unit."""
    return folder / UNITS / f"{unit:05d}.json"


def read_manifest(folder: Path) -> Manifest:
    """Read ``manifest.json``.

    Raises:
        RecipeError: there is none, or it is damaged.
    """
    values = read_json(folder / MANIFEST, RecipeError, "manifest of a folder of vectors")
    try:
        manifest = Manifest(dict(values["inputs"]), int(values["rows"]), int(values["unit_rows"]))
        intact = values["format"] == FORMAT and values["fingerprint"] == manifest.fingerprint
    except (KeyError, TypeError, ValueError):
        intact = False
    if not intact:
        raise RecipeError(f"{folder / MANIFEST}: damaged, or not a manifest of the format {FORMAT}.")
    return manifest


def read_record(folder: Path, unit: int) -> Record:
    """Read the record of a finished unit.

    Raises:
        RecipeError: it is damaged.
    """
    path = marker_path(folder, unit)
    values = read_json(path, RecipeError, "record of a unit")
    try:
        bad = tuple((str(entry["id"]), str(entry["reason"])) for entry in values["bad"])
        return Record(int(values["unit"]), int(values["rows"]), str(values["sha256"]), bad)
    except (KeyError, TypeError, ValueError):
        raise RecipeError(
            f"{path}: not the record of a unit. Remove it: the unit is then done again."
        ) from None


def done_units(folder: Path) -> set[int]:
    """The units that have their commit marker."""
    if not (folder / UNITS).is_dir():
        return set()
    names = (path.name for path in (folder / UNITS).iterdir())
    return {int(found[1]) for name in names if (found := _NUMBERED.fullmatch(name))}


def find_leftovers(folder: Path) -> Iterator[tuple[Path, int | None]]:
    """Half-written files of killed processes, each with the unit that it belongs to, if to one."""
    for place in (folder, folder / UNITS):
        for path in list(place.glob(".tmp-*")):
            name = _LEFTOVER.fullmatch(path.name)
            numbered = _NUMBERED.fullmatch(name[1]) if name else None
            yield path, int(numbered[1]) if numbered else None


def check_same_vectors(folder: Path, there: Manifest, wanted: Manifest) -> None:
    """Refuse to mix vectors.

    Raises:
        RecipeError: names what differs between the folder's manifest and the one that is wanted.
    """
    if there.fingerprint == wanted.fingerprint:
        return
    names = sorted(there.inputs.keys() | wanted.inputs.keys())
    differ = [name for name in names if there.inputs.get(name) != wanted.inputs.get(name)]
    details = ", ".join(_difference(name, there.inputs.get(name), wanted.inputs.get(name)) for name in differ)
    raise RecipeError(
        f"{folder} holds vectors that were made otherwise: {details}. "
        f"Set it back to go on there, or choose another out=."
    )


def _difference(name: str, before: Any, now: Any) -> str:
    long = any(not isinstance(value, int | str) or len(str(value)) > 40 for value in (before, now))
    return f"another {name}" if long else f"{name}={before} (now {now})"
