"""The section of a comparison: methods by their mean accuracy over several draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tldist import pictures
from tldist.errors import RecipeError
from tldist.files import read_json
from tldist.report.page import Picture, Section, Table
from tldist.report.text import is_number, name_of, read_settings, show

TABLE = "table.json"


def read_comparison(folder: Path) -> Section:
    """Read ``table.json``: a list of rows with method, mean, std and draws.

    Raises:
        RecipeError: it is damaged.
    """
    rows = read_json(folder / TABLE, RecipeError, "table of methods")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise RecipeError(f"{folder / TABLE}: expected a list of rows with 'method' and 'mean'.")
    names = [str(row["method"]) for row in rows]
    means = [float(row["mean"]) for row in rows]
    deviations = [float(row["std"]) if is_number(row.get("std")) else 0.0 for row in rows]
    best = max(range(len(rows)), key=means.__getitem__, default=None)
    cells = [
        [name, show(mean), show(row.get("std")), show(row.get("draws"))]
        for name, mean, row in zip(names, means, rows)
    ]
    drawn = pictures.bars(names, means, deviations, "accuracy") if rows else ""
    return Section(
        title=name_of(folder),
        kind="comparison",
        path=str(folder),
        headline=f"best {show(means[best])}" if best is not None else "",
        facts=[("best method", names[best])] if best is not None else [],
        pictures=[Picture(drawn, "Mean and standard deviation over the draws")] if rows else [],
        tables=[Table("Accuracy by method", ("method", "mean", "standard deviation", "draws"), cells)],
        settings=read_settings(folder),
    )


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and "method" in row and is_number(row.get("mean"))
