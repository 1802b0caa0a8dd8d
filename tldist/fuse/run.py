"""Fuse: files without torch, or bundles with all that is known of them."""

from __future__ import annotations

from tldist.fuse.recipe import FuseRecipe
from tldist.runs import Outcome


def run(recipe: FuseRecipe) -> Outcome:
    """Make one model of several; the same call again says that it is done.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    if recipe.raw:
        from tldist.fuse.raw import run_raw

        return run_raw(recipe)
    from tldist.fuse.bundles import fuse_bundles

    return fuse_bundles(recipe)
