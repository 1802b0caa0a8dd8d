"""Timing contenders side by side: they take turns, so that what disturbs the machine hits all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
"""uint8 images (N, H, W, 3) to an output (N, D), on the host: the whole way, copies included."""

_WARM_CALLS = 3
_WARM_SHARE = 0.2
"""Of the measured seconds that are spent on warming up first."""


@dataclass
class Timing:
    """What was measured of one contender.

    Attributes:
        first: seconds of the first call: planning, compiling.
        calls: seconds of each measured call.
        output: of the first call, float (N, D).
        failed: why it did not run; empty where it did.
    """

    first: float = 0.0
    calls: list[float] = field(default_factory=list)
    output: np.ndarray | None = None
    failed: str = ""

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return float(np.median(self.calls))

    @property
    def p99(self) -> float:
        """Seconds that 99 % of the calls stay within (the slowest, of few calls)."""
        return float(np.percentile(self.calls, 99, method="higher"))


def take_turns(
    contenders: Mapping[str, Callable[[], Run]], images: np.ndarray, seconds: float, rounds: int
) -> dict[str, Timing]:
    """Time contenders on the same images.

    Args:
        contenders: what builds each one, by name. One that raises is out, and its timing says why.
        images: uint8 (N, H, W, 3).
        seconds: measured for each, at least one call a round.
        rounds: in which each has its turn, in an order that moves on by one.
    """
    timings = {name: Timing() for name in contenders}
    running: dict[str, Run] = {}
    for name, build in contenders.items():
        try:
            running[name] = _warmed(build, images, timings[name], seconds)
        except Exception as error:  # a compiler, a precision or memory that is not there
            timings[name].failed = f"{type(error).__name__}: {_first_line(error)}"
    names = list(running)
    for number in range(rounds):
        turn = number % len(names) if names else 0
        for name in names[turn:] + names[:turn]:
            _repeat(running[name], images, timings[name].calls, seconds / rounds)
    return timings


def _warmed(build: Callable[[], Run], images: np.ndarray, timing: Timing, seconds: float) -> Run:
    start = time.perf_counter()
    run = build()
    timing.output = np.asarray(run(images))
    timing.first = time.perf_counter() - start
    calls: list[float] = []
    while len(calls) < _WARM_CALLS or sum(calls) < _WARM_SHARE * seconds:
        _repeat(run, images, calls, 0.0)
    return run


def _repeat(run: Run, images: np.ndarray, calls: list[float], seconds: float) -> None:
    """Call until the seconds are spent, once at least."""
    end = time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run(images)
        calls.append(time.perf_counter() - start)
        if time.perf_counter() >= end:
            return


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else "no reason given"
