"""Methods by name: one visible dictionary per family, and a person's own by dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from tldist.errors import RecipeError, close_matches

M = TypeVar("M")


def find_method(name: str, known: Mapping[str, M], wrap: Callable[[Any], M] | None = None) -> M:
    """The method of a name.

    Args:
        name: a key of ``known``, or ``package.module:function`` (named by the person at the keyboard).
        known: the family's dictionary.
        wrap: how the family holds its functions, if not as they are; called with a function of one's own.

    Raises:
        RecipeError: unknown (with the close matches), or it cannot be imported.
    """
    if ":" not in name:
        if name not in known:
            raise RecipeError(f"method={name}: unknown. {close_matches(name, known)}")
        return known[name]
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"method={name}: cannot be imported: {error}.") from error
    if not callable(found):
        raise RecipeError(f"method={name}: is a {type(found).__name__}, expected a function.")
    method: M = found if wrap is None else wrap(found)
    return method
