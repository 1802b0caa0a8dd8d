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
        notes=list(_notes(outputs, parity)),
        pictures=list(_scatters(outputs)),
        tables=list(_tables(outputs)),
        settings=_settings(config),
    )


def _facts(folder: Path, config: PackageConfig, parity: dict[str, Any]) -> Iterator[tuple[str, str]]:
    how = config.preprocessing
    yield "profile", config.profile_name
    yield "precision", show(config.profile.get("precision"))
    yield "provider", show(parity.get("provider") or config.profile.get("provider"))
    yield "outputs", ", ".join(f"{name} ({width:,})" for name, width in config.outputs.items())
    yield "classes", show(len(config.classes))
    yield "input", f"uint8, {how.height} x {how.width} pixels"
    if (folder / MODEL).is_file():
        yield "size of the graph", f"{(folder / MODEL).stat().st_size / 1e6:,.1f} MB"
    samples = parity.get("samples")
    if isinstance(samples, dict):
        yield "compared on", ", ".join(f"{show(count)} {name}" for name, count in samples.items())
    if parity.get("batches"):
        yield "at batch sizes", show(parity["batches"])


def _notes(outputs: list[dict[str, Any]], parity: dict[str, Any]) -> Iterator[str]:
    yield from (f"Fault: {problem}" for problem in parity.get("problems", []))
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
