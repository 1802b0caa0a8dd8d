"""Several domains as one: their classes by name, their samples under names that tell where they are from."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import PurePath

import numpy as np

from tldist.domain.index import WHOLE, Domain, sort_names
from tldist.errors import DomainError


class JoinedSource:
    """The samples of several domains, one domain after the other.

    Args:
        domains: at least one.
        names: of each; distinct.
    """

    def __init__(self, domains: Sequence[Domain], names: Sequence[str]) -> None:
        self._domains, self._names = list(domains), list(names)
        self._starts = [0, *accumulate(map(len, domains))]

    def __len__(self) -> int:
        return self._starts[-1]

    def _place(self, row: int) -> tuple[int, int]:
        """(domain, position in it)."""
        number = bisect_right(self._starts, row) - 1
        return number, row - self._starts[number]

    def id(self, row: int) -> str:
        number, index = self._place(row)
        return f"{self._names[number]}/{self._domains[number].id(index)}"

    def size(self, row: int) -> int:
        number, index = self._place(row)
        domain = self._domains[number]
        return domain.source.size(int(domain.rows[index]))

    def read(self, row: int) -> bytes:
        number, index = self._place(row)
        return self._domains[number].read(index)


def join(domains: Sequence[Domain]) -> Domain:
    """One domain of the samples of several; classes are matched by name.

    Raises:
        DomainError: some have splits, labels or lists of classes, and others not.
    """
    for what, has in (
        ("splits", [set(domain.split_counts) != {WHOLE} for domain in domains]),
        ("labels", [domain.has_labels for domain in domains]),
        ("several classes an image", [domain.is_multilabel for domain in domains]),
    ):
        if any(has) and not all(has):
            without, beside = domains[has.index(False)].name, domains[has.index(True)].name
            raise DomainError(
                f"{without} has no {what}, and {beside} has: they cannot be joined. Give them to all, or to "
                f"none."
            )
    classes = sort_names(name for domain in domains for name in domain.classes)
    found = [domain.labels_in(classes) for domain in domains]
    several = domains[0].is_multilabel
    count = sum(map(len, domains))
    return Domain(
        name=" + ".join(domain.name for domain in domains),
        source=JoinedSource(domains, _distinct([PurePath(domain.name).name for domain in domains])),
        rows=np.arange(count, dtype=np.int64),
        labels=np.full(count, -1, dtype=np.int32) if several else np.concatenate(found).astype(np.int32),
        classes=classes,
        splits=np.concatenate([domain.splits for domain in domains]),
        tags=np.concatenate(found) > 0 if several else None,
    )


def _distinct(names: list[str]) -> list[str]:
    """Equal names get their number."""
    return [
        name if names.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, start=1)
    ]
