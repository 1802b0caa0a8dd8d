"""From a path to its section of the page, by the file that tells what it holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tldist.errors import RecipeError
from tldist.report.comparison import read_comparison
from tldist.report.package import read_package_section
from tldist.report.page import Section
from tldist.report.stage import read_stage
from tldist.report.vectors import read_vectors

READERS: dict[str, tuple[str, Callable[[Path], Section]]] = {
    "package.json": ("a package of `tldist export`", read_package_section),
    "manifest.json": ("a folder of vectors of `tldist embed`", read_vectors),
    "table.json": ("a comparison of methods of `tldist demo`", read_comparison),
    "summary.json": ("a run", read_stage),
    "metrics.jsonl": ("a run that has not finished", read_stage),
}
"""What can be reported on, by the file that tells; the first that is there decides."""


def collect(path: Path) -> Section:
    """Read one run.

    Raises:
        RecipeError: it is nothing to report on, or a file of it is damaged.
    """
    for name, (_, read) in READERS.items():
        if (path / name).is_file():
            return read(path)
    expected = "; ".join(f"{what} ({name})" for name, (what, _) in READERS.items())
    if not path.exists():
        raise RecipeError(f"{path}: no such folder. Expected {expected}.")
    if (path / "config.json").is_file():
        raise RecipeError(f"{path}: a bundle alone has no history to report; give the run that it lies in.")
    raise RecipeError(f"{path}: nothing to report on was found there. Expected {expected}.")
