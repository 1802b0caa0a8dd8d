"""The settings of ``tldist evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Free, Recipe


class EvaluateRecipe(Recipe):
    """Measure a bundle or a package on a labelled domain."""

    inputs: ClassVar[tuple[str, ...]] = ("model",)

    model: Free[Path]
    """A bundle, a run that holds one, or an exported package."""
    data: DataRecipe
    """The labelled domain: its test split, else val, else all of it, unless data.split says which. The order
    of its classes does not matter."""
    batch_size: Free[int] = Field(default=64, ge=1)
    """Images that one process handles at once."""
    workers: Free[int | None] = Field(default=None, ge=0)
    """Decoding processes for each process; none: by the number of cores."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""
    out: Free[Path | None] = None
    """A run folder for the verdict (RUN/summary.json) and the list of broken images; none: only printed."""
