"""The settings of checkpoints, for every stage that trains."""

from __future__ import annotations

from pydantic import Field

from tldist.recipe import Free, Recipe


class CheckpointRecipe(Recipe):
    """What is saved while training, and when."""

    every_steps: Free[int | None] = Field(default=None, ge=1)
    """Save after this many steps too; a checkpoint is always saved at the end of an epoch."""
    keep: Free[int] = Field(default=2, ge=1)
    """How many of the newest checkpoints stay, besides the best."""
