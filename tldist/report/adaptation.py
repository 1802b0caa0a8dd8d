"""How a model was adapted and chosen, from its summary: what the target's labels were for, all trials."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tldist.report.page import Table
from tldist.report.text import show


def adaptation_notes(summary: dict[str, Any]) -> Iterator[str]:
    """Whether it was promoted, and what happened to the target's labels."""
    found = summary.get("adaptation")
    if not isinstance(found, dict):
        return
    method, chosen = show(found.get("method")), show(found.get("chosen"))
    if found.get("promoted"):
        yield f"Adapted by {method}: {chosen} was chosen."
    else:
        yield f"Adapted by {method}, and not promoted: the bundle is {chosen}."
    if found.get("labels") == "use":
        yield "The labels of the target were USED to choose: what is measured on it may be too good."
    unsealed = found.get("unsealed")
    if isinstance(unsealed, dict):
        yield (
            f"The labels of {show(unsealed.get('domain'))} were opened at {show(unsealed.get('at'))}, after "
            f"the choice, for {show(unsealed.get('why'))} (times opened: {show(unsealed.get('times'))})."
        )
    elif found.get("not_measured"):
        yield f"The accuracy on the target was not measured: {show(found['not_measured'])}."


def adaptation_tables(summary: dict[str, Any]) -> Iterator[Table]:
    """All trials, the best first."""
    found = summary.get("adaptation")
    rows = found.get("candidates") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows) or not rows:
        return
    scorers = list(dict.fromkeys(name for row in rows for name in _scores(row)))
    cells = [
        [
            show(row.get("name")),
            show(row.get("mean_rank")),
            show(row.get("test")),
            *(show(_scores(row).get(name)) for name in scorers),
            show(row.get("reason")),
        ]
        for row in rows
    ]
    columns = ("trial", "mean rank", "accuracy (opened after the choice)", *scorers, "why")
    yield Table("Chosen among", columns, cells, words=(0, len(columns) - 1))


def _scores(row: dict[str, Any]) -> dict[str, Any]:
    scores = row.get("scores")
    return scores if isinstance(scores, dict) else {}
