"""Axes that are joined: what binds, what splits, what is pinned."""

from __future__ import annotations

import numpy as np
import pytest

from tldist.fuse.rebasin.axes import Axis, AxisTable, Segment, axis_length, in_blocks


def new(table: AxisTable, *sizes: int) -> Axis:
    return tuple(segment for number, size in enumerate(sizes) for segment in table.new(size, str(number)))


def test_join__equal_layouts_become_one_and_keep_the_older_label() -> None:
    table = AxisTable()
    first, second = new(table, 4, 6), new(table, 4, 6)
    assert table.join(second, first) == first
    assert table.resolve(second) == first


def test_join__is_transitive_whatever_the_order() -> None:
    for order in np.random.default_rng(0).permuted(np.tile(np.arange(5), (20, 1)), axis=1):
        table = AxisTable()
        axes = [new(table, 7) for _ in range(6)]
        for link in order.tolist():
            table.join(axes[link], axes[link + 1])
        assert {table.resolve(axis) for axis in axes} == {axes[0]}


def test_join__a_whole_axis_takes_the_segments_of_the_other() -> None:
    table = AxisTable()
    whole, parts = new(table, 10), new(table, 4, 6)
    flat = in_blocks(whole, 9)
    table.join(whole, parts)
    assert table.resolve(whole) == parts
    assert [(part.size, part.block) for part in table.resolve(flat)] == [(4, 9), (6, 9)]
    assert axis_length(table.resolve(flat)) == axis_length(flat) == 90


def test_join__blocks_multiply() -> None:
    table = AxisTable()
    channels, groups = new(table, 12), new(table, 3)
    table.join(channels, in_blocks(groups, 4))
    assert table.resolve(in_blocks(channels, 5)) == (Segment(groups[0].variable, 3, 20),)


def test_join__segments_that_do_not_fit_are_pinned() -> None:
    table = AxisTable()
    first, second = new(table, 4, 6), new(table, 6, 4)
    table.join(first, second)
    assert not any(table.is_free(part) for part in (*first, *second))


@pytest.mark.parametrize("pinned_first", [True, False])
def test_pin__reaches_all_that_is_joined_before_or_after(pinned_first: bool) -> None:
    table = AxisTable()
    whole, parts, other = new(table, 10), new(table, 4, 6), new(table, 10)
    if pinned_first:
        assert table.join(other, None) is None
    table.join(whole, parts)
    table.join(other, whole)
    if not pinned_first:
        table.pin(other)
    assert not any(table.is_free(part) for axis in (whole, parts, other) for part in table.resolve(axis))


def test_join__one_variable_thrice_is_all_of_the_others() -> None:
    table = AxisTable()
    thrice, three = new(table, 4) * 3, new(table, 4, 4, 4)
    table.join(three, thrice)
    assert {part.variable for part in table.resolve(three)} == {thrice[0].variable}
