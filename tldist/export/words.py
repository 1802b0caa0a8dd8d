"""What ``tldist export`` says: its plan before, the steps and the verdict after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tldist.bundle import BundleConfig
from tldist.export.profile import Profile
from tldist.export.recipe import ExportRecipe
from tldist.runs import Outcome
from tldist.runtime.package import MODEL, PackageConfig

_INPUTS = {
    "fixed": "uint8 (batch, {height}, {width}, 3), normalised inside the graph",
    "dynamic": "uint8 (batch, any height, any width, 3), computed at that size",
    "picture": "uint8 (batch, any height, any width, 3), resized to {height}x{width} inside the graph",
}


def plan_of(recipe: ExportRecipe, profile: Profile, folder: Path, bundle: BundleConfig) -> dict[str, Any]:
    """The plan, row by row."""
    how, count = bundle.preprocessing, recipe.count(profile)
    source = f"{count} of {recipe.data.path}" if recipe.data else f"{count} generated"
    rows = {
        "bundle": f"{folder} ({len(bundle.classes)} classes)",
        "profile": f"{profile.name}: {profile.precision} on {profile.provider}",
        "input": _INPUTS[recipe.input].format(height=how.height, width=how.width),
        "outputs": ", ".join(recipe.outputs),
        "parity": f"on {source}{'' if recipe.data else ' (data= takes real ones)'}, black, white, noise",
    }
    ranges = recipe.calibration or recipe.data
    if profile.precision == "int8" and ranges:
        rows["calibration"] = f"{profile.quantization.samples} of {ranges.path}"
    return rows


def steps_table(steps: Sequence[dict[str, Any]]) -> list[str]:
    """A row a step: nodes, size, parity and latency after it."""
    rows = [["step", "nodes", "MB", "parity", "ms at batch 1", "at 32", ""]]
    rows += [_step_row(step) for step in steps if step["latency"] is not None or step["unmeasured"]]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _step_row(step: dict[str, Any]) -> list[str]:
    latency = step["latency"] or {}
    dropped = f"undone: {step['dropped']}" if step["dropped"] else step["unmeasured"]
    times = [f"{latency[batch]:.2f}" if batch in latency else "-" for batch in ("1", "32")]
    agrees = "out of tolerance" if step["faults"] else "agrees"
    return [step["name"], str(step["nodes"][1]), f"{step['bytes'][1] / 1e6:.1f}", agrees, *times, dropped]


def outcome(out: Path, config: PackageConfig, values: dict[str, Any], text: str) -> Outcome:
    """The outcome of an export, new or finished before."""
    about = {
        "package": config.identity,
        "bytes": sum(file.stat().st_size for file in out.glob(f"{MODEL}*")),
        "profile": config.profile_name,
        "exporter": config.exporter.get("name"),
    }
    return Outcome("export", out, {**values, **about}, text, next_command=f"tldist parity {out}")
