"""The table at the end: accuracy by method, mean and spread over the draws of labelled images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def make_table(accuracies: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """Rows of plain data, in the given order.

    Args:
        accuracies: by method, one accuracy a draw.

    Returns:
        For each method its mean, sample standard deviation (0 for one draw), and the draws themselves.
    """
    return [
        {
            "method": method,
            "mean": statistics.fmean(draws),
            "std": statistics.stdev(draws) if len(draws) > 1 else 0.0,
            "draws": list(draws),
        }
        for method, draws in accuracies.items()
    ]


def best_row(rows: Sequence[Mapping[str, Any]], among: Sequence[str]) -> Mapping[str, Any]:
    """The row with the highest mean among some methods."""
    return max((row for row in rows if row["method"] in among), key=lambda row: float(row["mean"]))


def show_table(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, int]) -> str:
    """The table for people.

    Args:
        rows: as made.
        labels: by method, how many labelled target images it saw.
    """
    width = max(len(str(row["method"])) for row in rows)
    draws = len(rows[0]["draws"])
    lines = [f"{'method'.ljust(width)}  labels  test accuracy ({draws} draws: mean, standard deviation)"]
    lines += [
        f"{str(row['method']).ljust(width)}  {labels[row['method']]:6d}  {row['mean']:.3f}  {row['std']:.3f}"
        for row in rows
    ]
    return "\n".join(lines)
