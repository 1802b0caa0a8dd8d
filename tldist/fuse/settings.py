"""From the recipe to what a method in weight space is told; what it does not use is said."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from tldist.errors import RecipeError
from tldist.fuse.recipe import FuseRecipe
from tldist.fuse.weights.method import Method, Settings, own_method
from tldist.fuse.weights.methods import METHODS
from tldist.methods import find_method
from tldist.progress import warn

SELECTIONS = ("greedy_soup", "search")
"""Methods that choose among merges by measuring them."""
COMPOSITES = ("ensemble", "concat", "distill")
"""Methods for models of any architectures."""
_OF_BUNDLES = frozenset({"classes", "heads", "statistics"})
_USED = {
    "greedy_soup": frozenset({"weights", *_OF_BUNDLES}),
    "search": frozenset({"base", "weights", "sources", *_OF_BUNDLES}),
    "ensemble": frozenset({"weights", "classes"}),
    "concat": frozenset[str](),
    "distill": frozenset({"weights"}),
}
"""What the methods take note of that are not one merge in weight space."""
_SETTINGS = (
    "base", "weights", "sources", "alpha", "curve", "scale", "density", "gamma", "match", "reduce", "classes",
    "heads", "statistics",
)  # fmt: skip
"""Settings that some methods have no use for."""


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

    weights = tuple(recipe.weights or (1.0,) * len(recipe.bundles))
    own = default_settings(method, weights, recipe.seed)
    return replace(
        own,
        alpha=recipe.alpha,
        scale=own.scale if recipe.scale is None else recipe.scale,
        density=own.density if recipe.density is None else recipe.density,
        gamma=own.gamma if recipe.gamma is None else recipe.gamma,
        reduce=recipe.reduce,
    )


def default_settings(method: Method, weights: tuple[float, ...], seed: int) -> Settings:
    """What a method is told where nobody says more."""
    own = method.defaults
    return Settings(
        weights,
        scale=own.get("scale", 1.0),
        density=own.get("density", 1.0),
        gamma=own.get("gamma", 0.0),
        seed=seed,
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


def used_settings(name: str, method: Method) -> frozenset[str]:
    """The settings that a method takes note of when it fuses bundles."""
    if name in _USED:
        return _USED[name]
    more = {"curve"} if "alpha" in method.uses else set()
    more |= {"sources"} if method.aid in ("fisher", "gram") else set()
    return method.uses | _OF_BUNDLES | more


def say_unused(recipe: FuseRecipe, used: Collection[str]) -> None:
    """Warn of settings that were given and have no effect with this method."""
    for name in _SETTINGS:
        given = getattr(recipe, name) != FuseRecipe.model_fields[name].default
        if given and name not in used:
            warn(f"{name}= is not used by method={recipe.method}")
