"""Decoded batches kept in memory, for domains that are walked through again and again."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tldist.data.loader import Batch, load_batches
from tldist.domain import Domain
from tldist.runtime.preprocess import Preprocessing

MOST_BYTES = 2 << 30
"""Of decoded images that one process keeps."""


class KeptBatches:
    """Gives the batches of a domain; after the first time, from memory where they fit.

    Args:
        domain: the images.
        how: the preprocessing of the models that see them.
        classes: the class list that labels refer to; None: the domain's own.
        workers: decoding processes.
        most_bytes: of images that are kept; more are decoded anew each time.
    """

    def __init__(
        self,
        domain: Domain,
        how: Preprocessing,
        *,
        classes: Sequence[str] | None = None,
        workers: int = 0,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self.domain, self.how, self.classes, self.workers = domain, how, classes, workers
        self.most_bytes = most_bytes
        self._kept: dict[str, list[Batch]] = {}

    def __call__(self, plans: Sequence[np.ndarray]) -> Iterable[Batch]:
        """The batches of these positions."""
        key = "|".join(",".join(map(str, plan)) for plan in plans)
        if key in self._kept:
            return self._kept[key]
        batches = load_batches(self.domain, plans, self.how, classes=self.classes, workers=self.workers)
        size = sum(map(len, plans)) * self.how.height * self.how.width * 3
        if size > self.most_bytes:
            return batches
        self._kept[key] = list(batches)
        return self._kept[key]
