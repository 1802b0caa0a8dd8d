"""What a finished adaptation has to say, from its summary."""

from __future__ import annotations

from typing import Any


def adaptation_values(summary: dict[str, Any]) -> dict[str, Any]:
    """For the verdict as JSON; nothing where nothing was adapted."""
    found = summary.get("adaptation")
    if not found:
        return {}
    test = summary.get("target_test") or {}
    return {
        "method": found["method"],
        "chosen": found["chosen"],
        "promoted": found["promoted"],
        "target_labels": found["labels"],
        "target_accuracy": test.get("accuracy"),
    }


def adaptation_words(summary: dict[str, Any]) -> list[str]:
    """For a person."""
    found = summary.get("adaptation")
    if not found:
        return []
    lines = [_choice_words(found)]
    test = summary.get("target_test")
    if test:
        rows = {row["name"]: row.get("test") for row in found["candidates"]}
        before = rows.get("source_only")
        beside = f", source-only {before:.4f}" if before is not None and found["promoted"] else ""
        lines.append(
            f"target accuracy {test['accuracy']:.4f} on {test['count']:,} images{beside} "
            f"(labels opened for this measurement)"
        )
    elif found.get("not_measured"):
        lines.append(f"no target accuracy: {found['not_measured']}")
    return lines


def _choice_words(found: dict[str, Any]) -> str:
    by = "labels of the target" if found["labels"] == "use" else "no labels of the target"
    if found["promoted"]:
        return f"{found['method']}: {found['chosen']} was chosen by {by} ({', '.join(found['scorers'])})"
    others = [row for row in found["candidates"] if row["name"] != found["chosen"]]
    reasons = [f"{row['name']}: {row['reason']}" for row in others if row.get("reason")]
    why = f" ({reasons[0]})" if reasons else ""
    return (
        f"NOT PROMOTED: by {by} no model adapted by {found['method']} is better than source-only, which is "
        f"the bundle{why}"
    )
