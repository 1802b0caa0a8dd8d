"""Values of JSON files as text for people, and reading them without trusting them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tldist.errors import RecipeError
from tldist.files import read_json
from tldist.runs import RECIPE

_MOST_SETTINGS = 20_000


def show(value: Any) -> str:
    """A value as text: numbers short, but long enough to be told from one another."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"
    if isinstance(value, list | tuple):
        return ", ".join(show(part) for part in value)
    return str(value)


def short(value: Any) -> str:
    """A value as text for a heading: hashes cut to what tells them apart, no idle zeros."""
    if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:16]
    return f"{value:,.6g}" if isinstance(value, float) else show(value)


def facts(values: Mapping[str, Any], names: Iterable[str]) -> list[tuple[str, str]]:
    """(name in words, value) of the ``names`` that are there and not nothing."""
    return [(name.replace("_", " "), short(values[name])) for name in names if values.get(name) is not None]


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RecipeError: it is damaged, or no object.
    """
    values = read_json(path, RecipeError, what)
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected a JSON object (a {what}), found a {type(values).__name__}.")
    return values


def read_settings(folder: Path) -> list[tuple[str, str]]:
    """The resolved recipe of a run as it lies there, if it does."""
    path = folder / RECIPE
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    return [("Settings", text if len(text) <= _MOST_SETTINGS else f"{text[:_MOST_SETTINGS]}\n...")]


def name_of(path: Path) -> str:
    """A short name of a folder: its own, or its parent's where its own says nothing."""
    resolved = path.resolve()
    return resolved.name or str(resolved)
