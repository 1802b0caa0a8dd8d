"""Recipes: the typed settings of one stage, from YAML and ``key=value`` to one frozen, validated object."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from tldist.errors import RecipeError, close_matches
from tldist.files import write_text

_SETTING = re.compile(r"[a-z_][a-z0-9_.]*=")
_NOTHING = {"none", "null", "~", ""}


@dataclass(frozen=True)
class Kind:
    """How a field may change when a stage is started again with the same ``out``."""

    name: Literal["identity", "extendable", "free"]


IDENTITY = Kind("identity")
"""Another value makes another run: refused for the same ``out``. What a field is when nothing is said."""
EXTENDABLE = Kind("extendable")
"""May grow (epochs)."""
FREE = Kind("free")
"""May change at will: it does not change the result (workers, logging)."""

T = TypeVar("T")
Free = Annotated[T, FREE]
Extendable = Annotated[T, EXTENDABLE]


class Recipe(BaseModel):
    """Base of all recipes: frozen, no extra keys, the sentence under a field is its help."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=()
    )

    shorthand: ClassVar[str | None] = None
    """The field that a plain value sets: ``data=P`` sets ``data.path``."""
    inputs: ClassVar[tuple[str, ...]] = ()
    """The fields that positional inputs fill, in order; a name that ends in ``*`` takes all that is left."""

    @model_validator(mode="before")
    @classmethod
    def _read_text_by_type(cls, values: Any) -> Any:
        if isinstance(values, str | Path | int) and cls.shorthand:
            values = {cls.shorthand: values}
        if not isinstance(values, dict):
            return values
        return {
            name: _read_text(value, cls.model_fields[name].annotation) if name in cls.model_fields else value
            for name, value in values.items()
        }

    @classmethod
    def make(cls, **values: Any) -> Self:
        """Build from keywords; a wrong one raises `RecipeError` in words for people."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise RecipeError(_explain(cls, error)) from error

    def replace(self, **values: Any) -> Self:
        """A copy with other values, validated again."""
        return self.make(**{**{name: getattr(self, name) for name in type(self).model_fields}, **values})

    def write(self, path: Path) -> None:
        """Write as YAML, readable again by `read_recipe`."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        write_text(path, text)


def _read_text(value: Any, annotation: Any) -> Any:
    """Read text by the field's type: ``none`` where None is allowed, ``a,b`` where a list is expected."""
    variants = list(type_variants(annotation))
    if isinstance(value, Path) and str in variants and Path not in variants:
        return str(value)
    if not isinstance(value, str):
        return value
    if type(None) in variants and value.lower() in _NOTHING:
        return None
    if any(get_origin(variant) in (tuple, list) for variant in variants) and str not in variants:
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def type_variants(annotation: Any) -> Iterator[Any]:
    """The members of a union, Annotated wrappers taken off."""
    if get_origin(annotation) is Annotated:
        yield from type_variants(get_args(annotation)[0])
    elif get_origin(annotation) in (types.UnionType, typing.Union):
        for member in get_args(annotation):
            yield from type_variants(member)
    else:
        yield annotation


def nested_recipe(field: FieldInfo) -> type[Recipe] | None:
    """The recipe class of a nested field, if it is one."""
    for variant in type_variants(field.annotation):
        if isinstance(variant, type) and issubclass(variant, Recipe):
            return variant
    return None


def walk_fields(recipe: type[Recipe], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """All settings with their dotted names, nested ones in place."""
    for name, field in recipe.model_fields.items():
        nested = nested_recipe(field)
        if nested:
            yield from walk_fields(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


# -- reading ---------------------------------------------------------------------------------------------


class _TextLoader(yaml.BaseLoader):
    """YAML in which every scalar stays text (the field's type reads it); no aliases, no repeated keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise RecipeError("a recipe may not contain YAML aliases (*name); write the value out.")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise RecipeError(f"the key '{key}' is given twice (line {key_node.start_mark.line + 1}).")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping as nested dicts and lists of text."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}.") from error
    try:
        values = yaml.load(text, Loader=_TextLoader)  # a BaseLoader: builds text, lists and dicts alone
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(error).split())}.") from error
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    except RecursionError:
        raise RecipeError(f"{path}: nested too deeply to be a recipe.") from None
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected 'key: value' lines, found a {type(values).__name__}.")
    return values


def is_setting(argument: str) -> bool:
    """Whether a command-line argument is ``key=value`` (else it is an input)."""
    return bool(_SETTING.match(argument))


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def read_recipe(recipe: type[AnyRecipe], arguments: Sequence[str]) -> AnyRecipe:
    """Build a recipe from command-line arguments: ``.yaml`` files first, then inputs, then settings.

    Args:
        recipe: the class of the stage.
        arguments: inputs, recipe files and ``key=value`` settings in any order.

    Raises:
        RecipeError: unknown keys, keys given twice, too many inputs, values of the wrong type.
    """
    values: dict[str, Any] = {}
    inputs: list[str] = []
    settings: dict[str, str] = {}
    for argument in arguments:
        if is_setting(argument):
            key, _, value = argument.partition("=")
            key = _full_key(recipe, key)
            if key in settings:
                raise RecipeError(f"the setting '{key}' is given twice: '{settings[key]}' and '{value}'.")
            settings[key] = value
        elif argument.endswith((".yaml", ".yml")):
            values = _merge(values, _expand_shorthands(recipe, read_yaml(argument)))
        else:
            inputs.append(argument)
    taken = _place_inputs(recipe, inputs)
    for key in taken:
        if key in settings:
            raise RecipeError(f"'{key}' is given twice: as an input ({taken[key]}) and as {key}=.")
    values = _merge(values, taken)
    for key, value in settings.items():
        _check_known(recipe, key)
        values = _merge(values, _nest(key.split("."), value))
    return recipe.make(**values)


def _full_key(recipe: type[Recipe], key: str) -> str:
    """``data`` -> ``data.path``: the key of the field that a plain value sets."""
    current: type[Recipe] = recipe
    parts = key.split(".")
    for part in parts:
        field = current.model_fields.get(part)
        nested = nested_recipe(field) if field else None
        if nested is None:
            return key
        current = nested
    return f"{key}.{current.shorthand}" if current.shorthand else key


def _expand_shorthands(recipe: type[Recipe], values: dict[str, Any]) -> dict[str, Any]:
    """Turn ``data: P`` of a file into ``data: {path: P}``, so that files and settings merge."""
    expanded = dict(values)
    for name, value in values.items():
        field = recipe.model_fields.get(name)
        nested = nested_recipe(field) if field else None
        if nested and isinstance(value, str) and nested.shorthand and value.lower() not in _NOTHING:
            expanded[name] = {nested.shorthand: value}
        elif nested and isinstance(value, dict):
            expanded[name] = _expand_shorthands(nested, value)
    return expanded


def _place_inputs(recipe: type[Recipe], inputs: list[str]) -> dict[str, Any]:
    taken: dict[str, Any] = {}
    rest = list(inputs)
    for slot in recipe.inputs:
        if not rest:
            break
        if slot.endswith("*"):
            taken[slot[:-1]], rest = rest, []
        else:
            field = recipe.model_fields[slot]
            nested = nested_recipe(field)
            value = rest.pop(0)
            taken[slot] = {nested.shorthand: value} if nested and nested.shorthand else value
    if rest:
        expected = ", ".join(slot.rstrip("*") for slot in recipe.inputs) or "none"
        raise RecipeError(
            f"unexpected input '{rest[0]}' (inputs here: {expected}). A setting is written key=value."
        )
    return taken


def _nest(parts: list[str], value: Any) -> dict[str, Any]:
    return {parts[0]: _nest(parts[1:], value) if len(parts) > 1 else value}


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check_known(recipe: type[Recipe], key: str) -> None:
    names = [name for name, _ in walk_fields(recipe)]
    groups = {name.rsplit(".", 1)[0] for name in names if "." in name}
    if key not in names and key not in groups:
        raise RecipeError(f"unknown setting '{key}'. {_closest_setting(key, names)}")


def _closest_setting(key: str, names: list[str]) -> str:
    leaf = key.rsplit(".", 1)[-1]
    same_leaf = [name for name in names if name.rsplit(".", 1)[-1] == leaf]
    return f"Did you mean: {', '.join(same_leaf)}?" if same_leaf else close_matches(key, names)


def _explain(recipe: type[Recipe], error: ValidationError) -> str:
    """The first lines of a validation error, in words for people."""
    names = [name for name, _ in walk_fields(recipe)]
    lines = []
    for problem in error.errors()[:5]:
        key = ".".join(str(part) for part in problem["loc"] if not _is_type_tag(part))
        if problem["type"] == "extra_forbidden":
            lines.append(f"unknown setting '{key}'. {_closest_setting(key, names)}")
        elif problem["type"] == "missing":
            lines.append(f"the setting '{key}' is missing: {_description(recipe, key)}")
        else:
            message = str(problem["msg"]).removeprefix("Value error, ")
            found = "" if problem["type"] == "value_error" else f" (found {problem['input']!r})"
            lines.append(f"{key}: {message}{found}" if key else message)
    return "\n".join(dict.fromkeys(lines))


def _is_type_tag(part: Any) -> bool:
    """pydantic adds the variant's type to the location of errors in unions: 'tuple[float,float]'."""
    return isinstance(part, str) and (part in {"int", "float", "str", "bool"} or "[" in part or "-" in part)


def _description(recipe: type[Recipe], key: str) -> str:
    for name, field in walk_fields(recipe):
        if name == key or name.startswith(f"{key}."):
            return field.description or ""
    return ""


# -- starting again --------------------------------------------------------------------------------------


def field_kind(field: FieldInfo) -> Kind:
    """Whether a field is identity (the default), extendable or free."""
    return next((mark for mark in field.metadata if isinstance(mark, Kind)), IDENTITY)


def check_same_run(folder: Path, old: Recipe, new: Recipe) -> None:
    """Refuse a recipe that would make another run of what ``folder`` holds.

    Raises:
        RecipeError: an identity field differs, or an extendable one shrank; it is named.
    """
    for name, field in walk_fields(type(new)):
        before, now = _get(old, name), _get(new, name)
        kind = field_kind(field)
        if before == now or kind is FREE:
            continue
        if kind is EXTENDABLE:
            if now > before:
                continue
            raise RecipeError(f"{folder} was made with {name}={before}; it may grow, not shrink to {now}.")
        raise RecipeError(
            f"{folder} was made with {name}={show_value(before)}, now it is {name}={show_value(now)}. "
            f"Set it back to go on there, or choose another out=."
        )


def fixed_values(recipe: Recipe) -> dict[str, str]:
    """All settings that a result depends on, by their dotted names, as they are typed."""
    return {
        name: show_value(_get(recipe, name))
        for name, field in walk_fields(type(recipe))
        if field_kind(field) is not FREE
    }


def _get(recipe: Recipe | None, dotted: str) -> Any:
    value: Any = recipe
    for part in dotted.split("."):
        value = getattr(value, part, None)
    return value


def show_value(value: Any) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(str(part) for part in value) or "(empty)"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else str(value)
