"""What a person sees while a stage works: the plan, the bar, the end. Only the main process speaks."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol


def is_main() -> bool:
    """Whether this process is the one that speaks and writes (rank 0, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print a line on the main process."""
    if is_main():
        print(text, flush=True)


def warn(text: str) -> None:
    """Print a warning on the main process: a fallback taken, a setting ignored."""
    if is_main():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def show_plan(stage: str, rows: Mapping[str, Any]) -> None:
    """Print what a stage is about to do, before it starts."""
    width = max((len(name) for name in rows), default=0)
    say(f"plan: {stage}")
    for name, value in rows.items():
        say(f"  {name.ljust(width)}  {value}")


class Bar(Protocol):
    """The part of a progress bar that stages use."""

    def update(self, n: int) -> Any: ...

    def set_postfix_str(self, s: str, refresh: bool = True) -> Any: ...


class _Silent:
    def update(self, n: int) -> None:
        return None

    def set_postfix_str(self, s: str, refresh: bool = True) -> None:
        return None


@contextmanager
def progress_bar(
    total: int, unit: str, label: str, done: int = 0, keep: bool = True, scale: bool = False
) -> Iterator[Bar]:
    """A bar with rate and time left on the main process, silence on the others.

    Args:
        total, unit: how much of what.
        label: what is being done.
        done: how much of it was done before.
        keep: leave the finished bar on the screen.
        scale: show thousands as k, M and G.
    """
    if not is_main():
        yield _Silent()
        return
    from tqdm import tqdm

    interval = 0.1 if sys.stderr.isatty() else 10.0  # a log file wants a line now and then, not a film
    with tqdm(
        total=total, initial=done, unit=unit, unit_scale=scale, desc=label, mininterval=interval, leave=keep
    ) as bar:
        yield bar
