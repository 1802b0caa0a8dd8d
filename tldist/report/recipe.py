"""The settings of ``tldist report``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tldist.recipe import Free, Recipe


class ReportRecipe(Recipe):
    """One HTML page about what was run."""

    inputs: ClassVar[tuple[str, ...]] = ("runs*",)

    runs: Free[tuple[Path, ...]] = Field(min_length=1)
    """What to report on, in order: runs, packages, folders of vectors."""
    out: Free[Path] = Path("report.html")
    """The page: one file without scripts, that loads nothing; an older one is replaced."""
    title: Free[str] = "Transfer learning report"
    """The heading of the page."""
