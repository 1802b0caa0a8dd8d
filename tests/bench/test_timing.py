"""Timing: contenders take turns, what fails says why, and the figures follow from the calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from tldist.bench.table import ONNX, make_rows, speed_up, to_text
from tldist.bench.timing import Run, Timing, take_turns

IMAGES = np.arange(4 * 2 * 2 * 3, dtype=np.uint8).reshape(4, 2, 2, 3)


def mean(images: np.ndarray) -> np.ndarray:
    return images.mean((1, 2))


def slow(seconds: float, seen: list[str], name: str) -> Callable[[], Run]:
    """Builds something that sleeps, and notes that it was called."""

    def run(images: np.ndarray) -> np.ndarray:
        seen.append(name)
        time.sleep(seconds)
        return mean(images)

    return lambda: run


def test_take_turns__each_has_its_turn_in_every_round() -> None:
    seen: list[str] = []
    contenders = {name: slow(0.002, seen, name) for name in ("a", "b", "c")}
    timings = take_turns(contenders, IMAGES, 0.6, 3)
    blocks = [name for number, name in enumerate(seen) if number == 0 or seen[number - 1] != name]
    # warmed up one after the other: abc; then three rounds, each begun by the next one: abc bca cab
    assert "".join(blocks) == "abcabcbcacab"
    for timing in timings.values():
        assert 6 <= len(timing.calls) <= 300, "each round lasts"
        assert all(0.002 <= call < 0.5 for call in timing.calls)
        assert timing.first >= 0.002
        np.testing.assert_array_equal(timing.output, mean(IMAGES))  # type: ignore[arg-type]


def test_take_turns__at_least_one_call_a_round() -> None:
    timings = take_turns({"a": slow(0.01, [], "a")}, IMAGES, 1e-9, 4)
    assert len(timings["a"].calls) == 4


def test_take_turns__the_slow_are_measured_as_slow() -> None:
    timings = take_turns({"a": slow(0.002, [], "a"), "b": slow(0.02, [], "b")}, IMAGES, 0.2, 4)
    rows = {row.variant: row for row in make_rows(4, timings, mean(IMAGES), {"a": 1e-6, "b": 1e-6})}
    assert 3 < timings["b"].median / timings["a"].median < 11
    assert rows["a"].images_per_second == pytest.approx(4 / timings["a"].median)


def test_take_turns__what_fails_says_why_and_stops_no_other() -> None:
    def cannot() -> Run:
        raise RuntimeError("\n  no compiler here\nand more lines")

    def later() -> Run:
        def run(_: np.ndarray) -> np.ndarray:
            raise MemoryError

        return run

    contenders = {"a": cannot, "b": later, "c": lambda: mean}
    timings = take_turns(contenders, IMAGES, 0.01, 2)
    assert timings["a"].failed == "RuntimeError: no compiler here"
    assert timings["b"].failed == "MemoryError: no reason given"
    assert len(timings["c"].calls) >= 2
    rows = make_rows(4, timings, mean(IMAGES), dict.fromkeys(contenders, 1e-6))
    assert [row.failed == "" for row in rows] == [False, False, True]
    assert "a did not run: RuntimeError: no compiler here" in to_text(rows)
    assert take_turns({"a": cannot}, IMAGES, 0.01, 2)["a"].calls == []


def timing(calls: list[float], output: np.ndarray) -> Timing:
    return Timing(first=1.0, calls=calls, output=output)


def test_rows__figures_by_hand() -> None:
    expected = np.array([[1.0, -4.0]])
    timings = {
        ONNX: timing([0.1, 0.2, 0.3], expected + 0.003),
        "eager": timing([0.4, 0.4, 4.0], expected),
        "bf16": timing([0.8], expected * 1.5),
        "nan": timing([0.8], expected * np.nan),
        "shape": timing([0.8], expected[:, :1]),
    }
    tolerances = {ONNX: 1e-3, "eager": 1e-3, "bf16": 0.2, "nan": 1.0, "shape": 1.0}
    own, eager, half, nan, shape = make_rows(8, timings, expected, tolerances)
    assert (own.median_ms, own.images_per_second, own.ratio) == pytest.approx((200, 40, 2))
    assert own.p99_ms == pytest.approx(300)
    assert own.error == pytest.approx(0.00075)
    assert (eager.median_ms, eager.p99_ms, eager.ratio) == pytest.approx((400, 4000, 1))
    assert half.error == pytest.approx(0.5)
    assert [row.wrong for row in (own, eager, half, nan, shape)] == [False, False, True, True, True]
    text = to_text([own, eager, half, nan, shape])
    assert "bf16 is off by 5.0e-01 (tolerance 2.0e-01)" in text
    assert "nan gives NaN, infinity or another shape" in text
    assert speed_up([own, eager]) == pytest.approx(2)
    assert speed_up([eager]) is None
    del timings["eager"]
    assert all(row.ratio is None for row in make_rows(8, timings, expected, tolerances))
