"""Decoded batches kept in memory, for domains that are walked through again and again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from tldist.data.loader import Batch, load_batches
from tldist.domain import Domain
from tldist.runtime.preprocess import Preprocessing

MOST_BYTES = 2 << 30
"""Of decoded images that one process keeps of a domain."""


class KeptBatches:
    """Gives the batches of a domain; after the first time, from memory where they fit.

    Args:
        domain: the images.
        how: the preprocessing of the models that see them.
        workers: decoding processes.
        most_bytes: of images that are kept; more are decoded anew each time.
    """

    def __init__(
        self, domain: Domain, how: Preprocessing, *, workers: int = 0, most_bytes: int = MOST_BYTES
    ) -> None:
        self.domain, self.how, self.workers, self.most_bytes = domain, how, workers, most_bytes
        self._kept: dict[bytes, list[Batch]] = {}

    def __call__(self, plans: Sequence[np.ndarray]) -> Iterable[Batch]:
        """The batches of these positions."""
        key = b"|".join(plan.tobytes() for plan in plans)
        if key in self._kept:
            return self._kept[key]
        batches = load_batches(self.domain, plans, self.how, workers=self.workers)
        taken = sum(batch.images.nbytes for kept in self._kept.values() for batch in kept)
        wanted = sum(map(len, plans)) * self.how.height * self.how.width * 3
        if taken + wanted > self.most_bytes:
            return batches
        self._kept[key] = list(batches)
        return self._kept[key]

    def labelled(self, classes: Sequence[str]) -> Callable[[Sequence[np.ndarray]], Iterator[Batch]]:
        """The same batches with labels that refer to another list of classes.

        Raises:
            DomainError: a class of the domain is not in the list.
        """
        labels = torch.from_numpy(self.domain.labels_in(classes))

        def load(plans: Sequence[np.ndarray]) -> Iterator[Batch]:
            for batch in self(plans):
                yield replace(batch, labels=labels[batch.indices])

        return load
