"""What becomes of each model's classes: merged by name, kept side by side, dropped, or learned anew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal

from tldist.errors import RecipeError

Heads = Literal["merge", "rebuild", "separate"]
Choice = Literal["union", "intersection", "target"]

_SHOWN = 12


@dataclass(frozen=True)
class ClassPlan:
    """The classes of the result, and where they come from.

    Attributes:
        classes: of the result.
        known: of each model, the names by which the result knows its classes.
        heads: how heads come together.
        dropped: classes that a model knows and the result does not.
    """

    classes: tuple[str, ...]
    known: tuple[tuple[str, ...], ...]
    heads: Heads
    dropped: tuple[str, ...]

    def fates(self) -> dict[str, list[str]]:
        """What happens to which classes, in words."""
        if self.heads == "rebuild":
            found = {"learned anew from data=": list(self.classes)}
        else:
            found = {}
            for name in self.classes:
                who = [number for number, names in enumerate(self.known, 1) if name in names]
                found.setdefault(_words(who, len(self.known)), []).append(name)
        if self.dropped:
            found["dropped"] = list(self.dropped)
        return found

    def shown(self) -> list[str]:
        """The same, shortened for the plan."""
        return [f"{len(names)} {words}: {_shorten(names)}" for words, names in self.fates().items()]


def _words(who: Sequence[int], count: int) -> str:
    if len(who) == count:
        return "merged from all models" if count > 1 else "of the model"
    if len(who) == 1:
        return f"from model {who[0]} alone"
    return f"merged from models {', '.join(map(str, who))}"


def _shorten(names: Sequence[str]) -> str:
    more = f", ... ({len(names) - _SHOWN} more)" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def plan_classes(
    models: Sequence[tuple[str, Sequence[str]]], heads: Heads, choice: Choice, target: Sequence[str] | None
) -> ClassPlan:
    """Plan the classes of a fusion.

    Args:
        models: label and class names of each.
        heads: of the recipe.
        choice: of the recipe.
        target: the classes that occur in the target domain; None without labels there.

    Returns:
        The plan; classes in the first model's order, then the next one's.

    Raises:
        RecipeError: nothing is left, or the target has classes that no model knows.
    """
    known = [tuple(names) for _, names in models]
    if heads == "separate":
        known = [
            tuple(f"{tag}/{name}" for name in names)
            for tag, names in zip(short_names([label for label, _ in models]), known)
        ]
    union = tuple(dict.fromkeys(name for names in known for name in names))
    if heads == "rebuild" or choice == "target":
        if target is None:
            wanted = "heads=rebuild" if heads == "rebuild" else "classes=target"
            raise RecipeError(f"{wanted} takes the classes of data=, and none with labels was given.")
        classes = tuple(target)
        unknown = [name for name in classes if name not in union]
        if unknown and heads != "rebuild":
            raise RecipeError(
                f"no model knows {len(unknown)} of the target's classes ({_shorten(unknown)}). "
                f"heads=rebuild fits a new head on labelled data=."
            )
    elif choice == "intersection":
        classes = tuple(name for name in union if all(name in names for names in known))
        if not classes:
            raise RecipeError("no class is known to all models; classes=union keeps them all.")
    else:
        classes = union
    return ClassPlan(classes, tuple(known), heads, tuple(name for name in union if name not in set(classes)))


def short_names(labels: Sequence[str]) -> list[str]:
    """A short name for each path, distinct: the shortest distinct ends; numbers where two are the same."""
    parts = [[part for part in PurePath(label).parts if part != "bundle"] for label in labels]
    for depth in range(1, max(map(len, parts)) + 1):
        tags = ["-".join(path[-depth:]) for path in parts]
        if len(set(tags)) == len(tags):
            return tags
    return [f"{number}" for number in range(1, len(labels) + 1)]
