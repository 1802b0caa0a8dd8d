"""The help of a stage's settings, from the sentences under the fields of its recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from tldist.recipe import IDENTITY, Recipe, field_kind, nested_recipe, show_value, type_variants


def describe_settings(recipe: type[Recipe], prefix: str = "", optional: bool = False) -> str:
    """The help of every setting: name, type, default, the sentence from its docstring."""
    blocks = []
    for name, field in recipe.model_fields.items():
        nested = nested_recipe(field)
        if nested is None:
            blocks.append(_describe_field(f"{prefix}{name}", field, optional))
            continue
        short = f" ({prefix}{name}=X sets {prefix}{name}.{nested.shorthand})" if nested.shorthand else ""
        text = " ".join((field.description or nested.__doc__ or "").split())
        blocks.append(_indented(f"  {prefix}{name}.*{short}", text))
        may_lack = optional or type(None) in type_variants(field.annotation)
        blocks.append(describe_settings(nested, f"{prefix}{name}.", may_lack))
    return "\n".join(blocks)


def _describe_field(name: str, field: FieldInfo, optional: bool) -> str:
    if field.is_required():
        default = f"required where {name.rsplit('.', 1)[0]} is given" if optional else "required"
    else:
        default = f"default {show_value(field.get_default())}"
    kind = field_kind(field)
    note = "" if kind is IDENTITY else f", {kind.name} on resume"
    head = f"  {name}  ({_type_words(field.annotation)}, {default}{note})"
    return _indented(head, " ".join((field.description or "").split()))


def _indented(head: str, body: str, width: int = 100) -> str:
    filled = textwrap.fill(body, width, initial_indent="      ", subsequent_indent="      ")
    return f"{head}\n{filled}" if body else head


def _type_words(annotation: Any) -> str:
    return " or ".join(dict.fromkeys(_one_type(variant) for variant in type_variants(annotation)))


def _one_type(variant: Any) -> str:
    if get_origin(variant) is Literal:
        return "|".join(str(choice) for choice in get_args(variant))
    if get_origin(variant) in (tuple, list):
        members: Iterable[Any] = (member for member in get_args(variant) if member is not Ellipsis)
        return "list of " + " and ".join(dict.fromkeys(_type_words(member) for member in members))
    words = {
        str: "text",
        int: "integer",
        float: "number",
        bool: "true|false",
        Path: "path",
        type(None): "none",
    }
    return words.get(variant, getattr(variant, "__name__", str(variant)))
