"""From the recipe to what a method in weight space is told; what it does not use is said."""

from __future__ import annotations

from collections.abc import Collection

from tldist.errors import RecipeError
from tldist.fuse.recipe import FuseRecipe
from tldist.fuse.weights.methods import METHODS, Method, Settings, own_method
from tldist.methods import find_method
from tldist.progress import warn

SELECTIONS = ("greedy_soup", "search")
"""Methods that choose among merges by measuring them."""
COMPOSITES = ("ensemble", "concat", "distill")
"""Methods for models of any architectures."""
_SETTINGS = ("base", "weights", "alpha", "scale", "density", "gamma", "curve", "match", "reduce")


def weight_method(name: str) -> Method:
    """The method in weight space of a name, or a person's own.

    Raises:
        RecipeError: unknown; the close names of all families are listed.
    """
    known = {**METHODS, **dict.fromkeys((*SELECTIONS, *COMPOSITES), METHODS["average"])}
    return find_method(name, known, own_method)


def is_of_tensors(name: str, method: Method) -> bool:
    """Whether a method needs tensors alone: neither data nor a network."""
    return name not in (*SELECTIONS, *COMPOSITES) and method.aid is None


def make_settings(recipe: FuseRecipe, method: Method) -> Settings:
    """What the method is told: the recipe's values, and its own defaults where the recipe has none."""

    def value(name: str, otherwise: float) -> float:
        given = getattr(recipe, name)
        return float(given) if given is not None else method.defaults.get(name, otherwise)

    weights = tuple(recipe.weights or (1.0,) * len(recipe.bundles))
    return Settings(
        weights,
        alpha=recipe.alpha,
        scale=value("scale", 1.0),
        density=value("density", 1.0),
        gamma=value("gamma", 0.0),
        seed=recipe.seed,
    )


def check_recipe(recipe: FuseRecipe, method: Method) -> None:
    """Refuse what is missing.

    Raises:
        RecipeError: no base, too few or too many bundles.
    """
    if method.needs_base and recipe.base is None:
        raise RecipeError(
            f"method={recipe.method} needs base=BUNDLE, the model that the others were fine-tuned from."
        )
    least, most = method.models
    count = len(recipe.bundles)
    if count < least or (most is not None and count > most):
        wanted = f"{least}" if least == most else f"at least {least}"
        raise RecipeError(f"method={recipe.method} fuses {wanted} bundles; {count} were given.")


def say_unused(recipe: FuseRecipe, used: Collection[str]) -> None:
    """Warn of settings that were given and have no effect with this method."""
    for name in _SETTINGS:
        given = getattr(recipe, name) != FuseRecipe.model_fields[name].default
        if given and name not in used:
            warn(f"{name}= is not used by method={recipe.method}")
