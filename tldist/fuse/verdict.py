"""What a fusion says at the end, from its summary: values for programs, a table for people."""

from __future__ import annotations

from typing import Any

from tldist.runs import BUNDLE, Outcome, RunFolder


def outcome_of(folder: RunFolder, note: str) -> Outcome:
    """The outcome of a finished run; ``note`` stands before it."""
    summary = folder.summary
    after, bundle = summary["after"], folder.path / BUNDLE
    lines = [note] if note else []
    if after:
        lines.append(_table(summary))
    values = {
        "bundle": str(bundle),
        "method": summary["method"],
        "before": {label: found["accuracy"] for label, found in summary["before"].items()},
        "merged": summary["merged"]["accuracy"] if summary["merged"] else None,
        "accuracy": after["accuracy"] if after else None,
        "batchnorm_batches": summary["batchnorm_batches"],
    }
    following = f"tldist export {bundle} profile=cpu-fp32 out={folder.path}/package"
    return Outcome("fuse", folder.path, values, "\n".join(lines), following)


def _table(summary: dict[str, Any]) -> str:
    """Accuracy and loss of every parent and of the result."""
    rows = list(summary["before"].items())
    if summary["batchnorm_batches"]:
        rows += [("merged, statistics pooled", summary["merged"])]
        rows += [("merged, statistics re-estimated", summary["after"])]
    else:
        rows += [("result", summary["after"])]
    width = max(len(label) for label, _ in rows)
    head = f"{'model'.ljust(width)}  accuracy  loss"
    return "\n".join(
        [head, *(f"{name.ljust(width)}  {row['accuracy']:8.4f}  {row['loss']:.4f}" for name, row in rows)]
    )
