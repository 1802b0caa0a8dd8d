"""The section of a package: what it gives, and how far it agrees with PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tldist import pictures
from tldist.report.page import Picture, Section, Table
from tldist.report.text import is_number, name_of, read_mapping, show
from tldist.runtime.package import MODEL, PARITY, PackageConfig, read_package

_FIGURES = {
    "rows": "comparisons",
    "max_absolute": "largest error",
    "mean_absolute": "mean error",
    "max_relative": "relative error",
    "tolerance": "tolerance",
    "own_error": "PyTorch's own error",
    "worst_group": "worst on",
    "cosine": "least cosine",
    "top1": "equal decisions",
    "neighbours": "equal neighbours",
}
_INPUTS = {
    "fixed": "uint8, {height} x {width} pixels",
    "dynamic": "uint8, any height and width",
    "picture": "uint8, any height and width, resized to {height} x {width} in the graph",
}


def read_package_section(folder: Path) -> Section:
    """Read a package and its parity report.

    Raises:
        PackageError: it is damaged.
        RecipeError: its parity report is damaged.
    """
    config = read_package(folder, verify=False)
    parity = read_mapping(folder / PARITY, "parity report") if (folder / PARITY).is_file() else {}
    status = str(parity.get("parity", "not compared"))
    outputs = [part for part in parity.get("outputs", []) if isinstance(part, dict)]
    return Section(
        title=name_of(folder),
        kind="package",
        path=str(folder),
        status=f"parity {status}",
        good={"PASS": True, "FAIL": False}.get(status),
        facts=list(_facts(folder, config, parity)),
        notes=list(_notes(config, outputs, parity)),
        pictures=list(_scatters(outputs)),
        tables=[*_tables(outputs), *_steps(config)],
        settings=_settings(config),
    )


def _facts(folder: Path, config: PackageConfig, parity: dict[str, Any]) -> Iterator[tuple[str, str]]:
    how = config.preprocessing
    yield "profile", config.profile_name
    yield "precision", show(config.profile.get("precision"))
    yield "provider", show(parity.get("provider") or config.profile.get("provider"))
    yield "outputs", ", ".join(f"{name} ({width:,})" for name, width in config.outputs.items())
    yield "classes", show(len(config.classes))
    yield "input", _INPUTS[config.input].format(height=how.height, width=how.width)
    if config.exporter:
        yield "exporter", f"{config.exporter.get('name')}, opset {config.exporter.get('opset')}"
    if (folder / MODEL).is_file():
        size = sum(file.stat().st_size for file in folder.glob(f"{MODEL}*"))
        yield "size of the graph", f"{size / 1e6:,.1f} MB"
    samples = parity.get("samples")
    if isinstance(samples, dict):
        yield "compared on", ", ".join(f"{show(count)} {name}" for name, count in samples.items())
    if parity.get("batches"):
        yield "at batch sizes", show(parity["batches"])


def _notes(config: PackageConfig, outputs: list[dict[str, Any]], parity: dict[str, Any]) -> Iterator[str]:
    yield from (f"Fault: {problem}" for problem in parity.get("problems", []))
    for refused in config.exporter.get("refused", []):
        yield f"The exporter {refused.get('exporter')} was not used: {refused.get('reason')}."
    for part in outputs:
        yield from (f"Fault in {part.get('output')}: {text}." for text in part.get("faults", []))
        yield from (f"Warning about {part.get('output')}: {text}." for text in part.get("warnings", []))


def _tables(outputs: list[dict[str, Any]]) -> Iterator[Table]:
    if not outputs:
        return
    names = [name for name in _FIGURES if any(part.get(name) is not None for part in outputs)]
    rows = [[show(part.get("output")), *(_figure(part.get(name)) for name in names)] for part in outputs]
    yield Table("Parity with PyTorch", ["output", *(_FIGURES[name] for name in names)], rows)
    groups = [
        [
            show(part.get("output")),
            *(show(group.get(name)) for name in ("name", "rows")),
            *(_figure(group.get(name)) for name in ("max_relative", "tolerance", "own_error", "cosine")),
        ]
        for part in outputs
        for group in part.get("groups", [])
    ]
    if groups:
        columns = ("output", "samples", "comparisons", "relative error", "tolerance", "PyTorch's own error")
        yield Table("By kind of sample", (*columns, "least cosine"), groups, words=(0, 1))


def _steps(config: PackageConfig) -> Iterator[Table]:
    """What was done to the graph, and what each step brought."""
    if config.steps:
        names = ("step", "nodes", "MB", "parity", "ms an image", "ms a batch of 32", "what it did")
        yield Table(
            "Steps after the exporter", names, [_step(step) for step in config.steps], words=(0, 3, 6)
        )


def _step(step: dict[str, Any]) -> list[str]:
    latency = step.get("latency") or {}
    notes = [str(step.get("what", ""))] + [f"undone: {step['dropped']}"] * bool(step.get("dropped"))
    notes += [f"level {name}: {show(time)} ms" for name, time in (step.get("levels") or {}).items()]
    faults = step.get("faults")
    parity = "" if latency == {} and not faults else "; ".join(faults or []) or "agrees"
    size, count = step.get("bytes"), step.get("nodes")
    return [
        show(step.get("name")),
        show(count[-1] if count else None),
        f"{size[-1] / 1e6:.1f}" if size else "",
        parity,
        *(f"{latency[batch]:.2f}" if batch in latency else "" for batch in ("1", "32")),
        "; ".join(notes),
    ]


def _figure(value: Any) -> str:
    """Errors are small and cosines near 1: more digits than elsewhere."""
    if isinstance(value, float):
        return f"{value:.7f}" if 0.5 < value <= 1 else f"{value:.2e}"
    return show(value)


def _scatters(outputs: list[dict[str, Any]]) -> Iterator[Picture]:
    for part in outputs:
        kept = [pair for pair in part.get("pairs", []) if len(pair) == 2 and all(map(is_number, pair))]
        if kept:
            svg = pictures.agreement(np.array(kept, dtype=float), "PyTorch", "package")
            yield Picture(svg, f"{part.get('output')}: {len(kept)} values of the package against PyTorch's")


def _settings(config: PackageConfig) -> list[tuple[str, str]]:
    parts = {
        "Profile": config.profile,
        "Settings": config.lineage.get("recipe"),
        "Versions": config.versions,
    }
    return [
        (name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
        for name, value in parts.items()
        if value
    ]
