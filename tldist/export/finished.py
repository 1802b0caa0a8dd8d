"""What an earlier, equal export left: it is not made again, and another one is not overwritten."""

from __future__ import annotations

from tldist.bundle import BundleConfig
from tldist.errors import RecipeError
from tldist.export.profile import Profile
from tldist.export.recipe import ExportRecipe
from tldist.recipe import check_same_run
from tldist.runtime.package import PackageConfig, is_package, read_package


def find_finished(recipe: ExportRecipe, profile: Profile, bundle: BundleConfig) -> PackageConfig | None:
    """The package at ``out``, if the same export wrote it; None: there is nothing.

    Raises:
        RecipeError: ``out`` holds something else.
    """
    if not recipe.out.exists() or (recipe.out.is_dir() and not any(recipe.out.iterdir())):
        return None
    if not is_package(recipe.out):
        raise RecipeError(f"{recipe.out} exists and is not a package; choose another out= or remove it.")
    there = read_package(recipe.out)
    if there.bundle["identity"] != bundle.identity:
        raise RecipeError(f"{recipe.out} holds the package of another bundle; choose another out=.")
    if there.profile != profile.model_dump(mode="json"):
        raise RecipeError(
            f"{recipe.out} was made with another profile, or an older text of it ({there.profile_name}); "
            f"choose another out=."
        )
    before = ExportRecipe.make(**there.lineage["recipe"])
    if (before.data is None) != (recipe.data is None):
        was = "generated pictures" if before.data is None else f"pictures of {before.data.path}"
        raise RecipeError(f"{recipe.out} was compared on {was}; set data= back, or choose another out=.")
    check_same_run(recipe.out, before, recipe)
    return there
