"""The settings of ``tldist doctor``: it has none."""

from __future__ import annotations

from tldist.recipe import Recipe


class DoctorRecipe(Recipe):
    """Look at this machine and, where a launcher started it, at this job."""
