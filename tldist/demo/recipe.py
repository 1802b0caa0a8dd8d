"""The settings of ``tldist demo``."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tldist.recipe import Extendable, Free, Recipe


class DemoRecipe(Recipe):
    """Tell the story of transfer learning, from printed digits to a checked model of handwritten ones."""

    out: Free[Path] = Path("runs/demo")
    """The folder of all runs of the story. The same command goes on where it stopped."""
    seed: int = Field(default=0, ge=0)
    """Of the printed digits, and of every training."""
    draws: Extendable[int] = Field(default=3, ge=1)
    """How many random choices of the labelled images the table is taken over."""
    labelled: int = Field(default=5, ge=2)
    """Labelled images of each handwritten digit to learn from; all others are the test set."""
    printed: int = Field(default=250, ge=10)
    """Printed images of each digit in each source domain; a fifth of them chooses the best."""
    quick: bool = False
    """Train so little that the table means nothing: to see that every step works here."""
