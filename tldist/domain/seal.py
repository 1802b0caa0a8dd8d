"""A domain whose labels cannot be read: what is left of a target while a model adapts to it."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np

from tldist.domain.index import Domain, Source, id_hash
from tldist.runtime.decode import BadImage


class SealedSource:
    """Samples of a source in another order, under names that do not tell their class.

    Args:
        source: where they are.
        rows: of the source, in order.
        names: of each.
    """

    def __init__(self, source: Source, rows: list[int], names: list[str]) -> None:
        self._source, self._rows, self._names = source, rows, names

    def __len__(self) -> int:
        return len(self._rows)

    def id(self, row: int) -> str:
        return self._names[row]

    def size(self, row: int) -> int:
        return self._source.size(self._rows[row])

    def read(self, row: int) -> bytes:
        return self._source.read(self._rows[row])


def seal(domain: Domain) -> Domain:
    """A view of a domain without labels: it has no classes, and `Domain.has_labels` is False.

    Its samples are known by their file names alone (the folder is the class), and by their content where a
    name comes twice; they are in the order of a hash of that. So whatever is computed from the view is the
    same, bit for bit, whatever the labels say.
    """
    names = [domain.id(index).rsplit("/", 1)[-1] for index in range(len(domain))]
    times = Counter(names)
    # Equal names and equal contents are equal images: which of them comes first makes no difference.
    told = [
        f"{name}#{_content(domain, index)}" if times[name] > 1 else name for index, name in enumerate(names)
    ]
    order = sorted(range(len(domain)), key=lambda index: (id_hash(told[index]), str(domain.splits[index])))
    return replace(
        domain,
        source=SealedSource(
            domain.source, domain.rows[order].tolist(), _distinct([told[index] for index in order])
        ),
        rows=np.arange(len(domain), dtype=np.int64),
        labels=np.full(len(domain), -1, dtype=np.int32),
        classes=(),
        splits=domain.splits[order],
        tags=None,
    )


def _content(domain: Domain, index: int) -> str:
    try:
        return hashlib.sha256(domain.read(index)).hexdigest()[:16]
    except BadImage:
        return "broken"


def _distinct(names: list[str]) -> list[str]:
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return distinct
