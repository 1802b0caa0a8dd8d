"""What a fusion chose among, from its summary: the ranking of a search, the curve over alpha, the soup."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tldist import pictures
from tldist.report.page import Picture, Table
from tldist.report.text import is_number, show

_MOST = 40


def choice_pictures(summary: dict[str, Any]) -> Iterator[Picture]:
    """The accuracy of each merge that was tried, and of each alpha."""
    rows = _search_rows(summary)[:_MOST]
    if rows:
        sources = list(dict.fromkeys(name for row in rows for name in _sources(row)))
        series: dict[str, list[float | None]] = {"target": [float(row["accuracy"]) for row in rows]}
        series |= {name: [_sources(row).get(name) for row in rows] for name in sources}
        yield Picture(
            pictures.ranking([str(row["name"]) for row in rows], series, "accuracy"), "Merges tried"
        )
    curve = [row for row in _rows(summary.get("curve")) if is_number(row.get("alpha"))]
    if curve:
        points = [float(row["alpha"]) for row in curve], [float(row["accuracy"]) for row in curve]
        chosen = summary.get("alpha")
        svg = pictures.curves(
            {"validation": points},
            "accuracy",
            xlabel="alpha",
            mark=float(chosen) if isinstance(chosen, int | float) else None,
            mark_label="chosen",
        )
        yield Picture(svg, "From the base (0) to the fine-tuned (1)")


def choice_tables(summary: dict[str, Any]) -> Iterator[Table]:
    """The merges tried, and who came into the soup."""
    rows = _search_rows(summary)
    if rows:
        sources = list(dict.fromkeys(name for row in rows for name in _sources(row)))
        cells = [
            [
                str(row["name"]),
                str(row.get("kind", "")),
                show(row["accuracy"]),
                show(row.get("loss")),
                *(show(_sources(row).get(name)) for name in sources),
            ]
            for row in rows
        ]
        yield Table("Merges tried", ("merge", "kind", "accuracy", "loss", *sources), cells, words=(0, 1))
    soup = _rows(summary.get("soup"))
    if soup:
        cells = [
            [str(row.get("model", "")), show(row["accuracy"]), "yes" if row.get("taken") else "no"]
            for row in soup
        ]
        columns = ("model", "accuracy with it", "taken")
        yield Table("The soup, in the order of trial", columns, cells, words=(0, 2))


def _search_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    search = summary.get("search")
    table = search.get("table") if isinstance(search, dict) else None
    return [row for row in _rows(table) if isinstance(row.get("name"), str)]


def _rows(value: Any) -> list[dict[str, Any]]:
    """The rows of a list that have an accuracy."""
    if not isinstance(value, list):
        return []
    return [row for row in value if isinstance(row, dict) and is_number(row.get("accuracy"))]


def _sources(row: dict[str, Any]) -> dict[str, float]:
    found = row.get("sources")
    if not isinstance(found, dict):
        return {}
    return {str(name): float(value) for name, value in found.items() if is_number(value)}
