"""Merges that are tried on validation, each measured once: what was measured survives an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tldist.errors import RecipeError
from tldist.fuse.in_weights import Merge, build
from tldist.fuse.job import Job
from tldist.training.measure import Measurement

_FILE = "trials.jsonl"


@dataclass(frozen=True)
class Score:
    """How good something is on a domain.

    Attributes:
        score: what more is better of; accuracy, or mean average precision.
        accuracy: share of right answers.
        loss: in nats.
    """

    score: float
    accuracy: float
    loss: float

    @classmethod
    def of(cls, found: Measurement) -> Score:
        """Of a measurement."""
        return cls(found.score, found.accuracy, found.loss)

    @property
    def key(self) -> tuple[float, float]:
        """Sorts by score, then by the lower loss."""
        return self.score, -self.loss


class Trials:
    """Measures merges of a job on its validation images.

    Args:
        job: the fusion; ``data`` must have labels.

    Raises:
        RecipeError: nothing to choose on.
    """

    def __init__(self, job: Job) -> None:
        if job.validation is None:
            raise RecipeError(f"method={job.recipe.method} chooses on labelled data=, and none was given.")
        self.job, self.validation = job, job.validation
        self.file = job.folder.path / _FILE
        self._done: dict[str, dict[str, Any]] = job.team.on_main(self._read)

    def _read(self) -> dict[str, dict[str, Any]]:
        if not self.file.is_file():
            return {}
        found = {}
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a kill may have left half a line at the end
                continue
            found[row.pop("trial")] = row
        return found

    def score(self, name: str, merge: Merge, *, most_batches: int | None = None) -> Score:
        """Of a merge with its statistics fitted; called by all processes together.

        Args:
            name: of the trial; distinct.
            merge: what is merged.
            most_batches: that fit its statistics.
        """

        def measured() -> dict[str, Any]:
            built = build(self.job, merge, most_batches=most_batches)
            found = self.job.measure(built.model, built.config, self.validation, name)
            if found is None:
                raise RecipeError(
                    f"{name}: cannot be measured on {self.validation.name}; choose other data=."
                )
            return vars(Score.of(found))

        return Score(**self.once(name, measured))

    def once(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``measure`` gives, or gave before an interruption."""
        if name not in self._done:
            self._done[name] = measure()
            self.job.team.on_main(lambda: self._write(name))
        return self._done[name]

    def _write(self, name: str) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"trial": name, **self._done[name]}) + "\n")

    def parents(self) -> dict[str, Score]:
        """Of every parent that can be measured there, by label."""
        found = self.job.measure_parents(self.validation)
        labels = {parent.label for parent in self.job.parents}
        return {label: Score.of(measured) for label, measured in found.items() if label in labels}
