"""Which axes of tensors must be permuted together: unification of axes that are made of segments."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A run of positions on an axis of a tensor.

    Attributes:
        variable: whose units these are.
        size: how many units.
        block: how many positions in a row belong to one unit (a channel's pixels after a flatten).
    """

    variable: int
    size: int
    block: int = 1


Axis = tuple[Segment, ...]
"""An axis of a tensor, as segments one after the other (several after a concatenation)."""


def axis_length(axis: Axis) -> int:
    """The number of positions on an axis."""
    return sum(segment.size * segment.block for segment in axis)


def in_blocks(axis: Axis, block: int) -> Axis:
    """The axis on which every position of ``axis`` has become ``block`` positions in a row."""
    return tuple(Segment(part.variable, part.size, part.block * block) for part in axis)


class AxisTable:
    """Variables for orders of units, and what has been found out about them.

    A variable is free (any permutation of its units leaves the network's function as it is), pinned (its
    units must stay where they are), or bound: an axis of other variables stands in its place.
    """

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._bound: dict[int, Axis] = {}
        self._pinned: set[int] = set()

    def new(self, size: int, label: str) -> Axis:
        """An axis of ``size`` units that nothing is known about yet."""
        self.labels.append(label)
        return (Segment(len(self.labels) - 1, size),)

    def resolve(self, axis: Axis) -> Axis:
        """The axis with free and pinned variables alone."""
        found: list[Segment] = []
        for segment in axis:
            if segment.variable in self._bound:
                inner = self._bound[segment.variable] = self.resolve(self._bound[segment.variable])
                found += in_blocks(inner, segment.block)
            else:
                found.append(segment)
        return tuple(found)

    def is_free(self, segment: Segment) -> bool:
        """Whether a segment of a resolved axis may be permuted."""
        return segment.variable not in self._pinned

    def pin(self, axis: Axis | None) -> None:
        """Let the units of an axis stay where they are. None is an axis that is pinned anyway."""
        self._pinned.update(segment.variable for segment in self.resolve(axis or ()))

    def join(self, first: Axis | None, second: Axis | None) -> Axis | None:
        """Let two axes of one length have one order; None stands for an axis that keeps its order.

        Axes whose segments do not fit each other are pinned, both.
        """
        if first is None or second is None:
            self.pin(first)
            self.pin(second)
            return None
        first, second = self.resolve(first), self.resolve(second)
        assert axis_length(first) == axis_length(second)
        if [(part.size, part.block) for part in first] == [(part.size, part.block) for part in second]:
            for mine, theirs in zip(first, second):
                self._join_variables(mine, theirs)
        elif len(first) == 1 and first[0].block == 1:
            self._bind(first[0].variable, second)
        elif len(second) == 1 and second[0].block == 1:
            self._bind(second[0].variable, first)
        else:
            self.pin(first)
            self.pin(second)
        return self.resolve(first)

    def _join_variables(self, mine: Segment, theirs: Segment) -> None:
        """Two variables of one size become one: the older of the two, whose label names the group."""
        # A pair before this one may have bound either of them, to a variable of the same size.
        variables = [
            self.resolve((Segment(part.variable, part.size),))[0].variable for part in (mine, theirs)
        ]
        older, newer = min(variables), max(variables)
        if older != newer:
            self._bind(newer, (Segment(older, mine.size),))

    def _bind(self, variable: int, axis: Axis) -> None:
        if variable in self._pinned:
            self.pin(axis)
        self._bound[variable] = axis
