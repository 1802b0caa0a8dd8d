"""The loop: take a unit, decode, compute, commit, until nothing is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tldist.domain import Domain
from tldist.embed.claims import Claims, take_units
from tldist.embed.engine import Embed
from tldist.embed.layout import Manifest, marker_path
from tldist.embed.parts import commit_unit
from tldist.embed.pipeline import BatchPlan, Decoder, cut_batches
from tldist.errors import DomainError, Preempted
from tldist.progress import Bar
from tldist.training.signals import StopFlag

POLL_SECONDS = 0.2
"""How often a process looks whether the others have finished."""


@dataclass
class Work:
    """One process's part.

    Attributes:
        folder: the folder of vectors.
        manifest: what it shall hold.
        domain: the images.
        embed: the model.
        decoder: batches of images, ahead of the model.
        claims: by which processes share the units.
        bar: counts the images that anybody has done.
        stop: set when the job is told to stop.
        broken: images that this process could not decode, by their position in the domain.
    """

    folder: Path
    manifest: Manifest
    domain: Domain
    embed: Embed
    decoder: Decoder
    claims: Claims
    bar: Bar
    stop: StopFlag
    broken: dict[int, str] = field(default_factory=dict)

    def run(self, missing: Sequence[int]) -> None:
        """Do units of ``missing`` until all are done, by this process or others.

        Raises:
            Preempted: told to stop; what is committed stays.
            DomainError: more broken images than the domain's limit.
        """
        vectors: list[np.ndarray] = []
        bad: dict[int, str] = {}
        for batch in self.decoder.batches(self._plans(missing)):
            if self.stop.requested:
                raise Preempted("told to stop; finished units are kept. Run the same command again to go on.")
            if batch is None:
                time.sleep(POLL_SECONDS)
                continue
            rows = batch.plan.rows
            vectors.append(self.embed(batch.images)[: len(rows)])
            bad.update({rows[place]: reason for place, reason in batch.bad})
            self.bar.update(len(rows))
            if batch.plan.last:
                commit_unit(
                    self.folder, self.manifest, batch.plan.unit, self.domain, np.concatenate(vectors), bad
                )
                self.claims.give_back(batch.plan.unit)
                self.broken |= bad
                vectors, bad = [], {}
                check_broken(self.domain, len(self.broken), self._first_broken, at_least=True)

    def _plans(self, missing: Sequence[int]) -> Iterator[BatchPlan | None]:
        def is_done(unit: int) -> bool:
            return marker_path(self.folder, unit).exists()

        def elsewhere(unit: int) -> None:
            self.bar.update(len(self.manifest.rows_of(unit)))

        for unit in take_units(missing, is_done, self.claims, elsewhere):
            if unit is None:
                yield None
            else:
                yield from cut_batches(unit, self.manifest.rows_of(unit), self.decoder.batch_size)

    def _first_broken(self) -> tuple[str, str]:
        row, reason = min(self.broken.items())
        return self.domain.id(row), reason


def check_broken(domain: Domain, count: int, first: Callable[[], tuple[str, str]], at_least: bool) -> None:
    """Judge the broken images.

    Args:
        domain: where they lie.
        count: how many are known.
        first: gives (id, reason) of the first of them.
        at_least: whether there may be more.

    Raises:
        DomainError: more than the domain's limit.
    """
    if count <= domain.max_bad * len(domain):
        return
    name, reason = first()
    raise DomainError(
        f"{domain.name}: {'at least ' if at_least else ''}{count} of {len(domain)} images are broken, more "
        f"than data.max_bad={domain.max_bad} allows; the first is {name} ({reason}). All are listed in the "
        f"records in units/. Repair or remove them, or raise data.max_bad and run the same command again."
    )
