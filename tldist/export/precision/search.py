"""Finds a small set of culprits by trying: how many of a ranking are needed, and which of them are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tldist.progress import progress_bar

Accept = Callable[[frozenset[str]], bool]
"""Whether all is well with a set."""


def smallest_prefix(ranked: Sequence[str], accept: Accept) -> tuple[str, ...] | None:
    """The shortest beginning of a ranking that is accepted, if more never hurts: doubled, then bisected.

    Args:
        ranked: most suspicious first.
        accept: is asked about 2 log2(N) times. The empty set was asked about before.

    Returns:
        None where not even all of them are accepted.
    """
    low, high = 0, 1  # low fails; high is tried next
    while not accept(frozenset(ranked[:high])):
        if high >= len(ranked):
            return None
        low, high = high, min(2 * high, len(ranked))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if accept(frozenset(ranked[:middle])) else (middle, high)
    return tuple(ranked[:high])


def pruned(chosen: Sequence[str], accept: Accept, most: int = 24) -> tuple[str, ...]:
    """What is left of a set after leaving out, one by one, what can be done without.

    Args:
        chosen: an accepted set, most suspicious first; the last ones are tried first.
        accept: is asked at most ``most`` times.
        most: how many are tried.
    """
    left = list(chosen)
    for name in list(reversed(chosen))[:most]:
        fewer = [other for other in left if other != name]
        if fewer and accept(frozenset(fewer)):
            left = fewer
    return tuple(left)


def told(accept: Accept, label: str) -> Accept:
    """The same question, asked once for each set, with a line of progress."""
    known: dict[frozenset[str], bool] = {}

    def asked(names: frozenset[str]) -> bool:
        if names not in known:
            with progress_bar(1, "trial", f"{label}: without {len(names)}", keep=False) as bar:
                known[names] = accept(names)
                bar.update(1)
        return known[names]

    return asked
