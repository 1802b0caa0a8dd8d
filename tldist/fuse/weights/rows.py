"""The rows of a head by class name: which models have a row for each class of the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RowGroup:
    """Classes that the same models know.

    Attributes:
        out: rows of the result.
        models: numbers of the models that know them.
        rows: for each of those, its rows, in the order of ``out``.
        base: the base's rows; None where it does not know all of them.
    """

    out: tuple[int, ...]
    models: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    base: tuple[int, ...] | None


@dataclass(frozen=True)
class RowPlan:
    """How the rows of a head come together.

    Attributes:
        count: rows of the result.
        groups: that make them up.
    """

    count: int
    groups: tuple[RowGroup, ...]


def plan_rows(classes: Sequence[str], models: Sequence[Sequence[str]], base: Sequence[str] | None) -> RowPlan:
    """Group the classes of the result by the models that know them.

    Args:
        classes: of the result, each known to one model at least.
        models: class names of each model, in the order of its rows.
        base: of the base; None without one.
    """
    known = [{name: row for row, name in enumerate(names)} for names in models]
    ancestor = {name: row for row, name in enumerate(base or ())}
    groups: dict[tuple[tuple[int, ...], bool], list[int]] = {}
    for place, name in enumerate(classes):
        who = tuple(number for number, rows in enumerate(known) if name in rows)
        groups.setdefault((who, name in ancestor), []).append(place)
    return RowPlan(
        len(classes),
        tuple(
            RowGroup(
                tuple(places),
                who,
                tuple(tuple(known[number][classes[place]] for place in places) for number in who),
                tuple(ancestor[classes[place]] for place in places) if in_base else None,
            )
            for (who, in_base), places in groups.items()
        ),
    )
