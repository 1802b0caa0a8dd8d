"""The verdict on a package: run its graph on the reference samples, compare, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tldist.export.agreement import Agreement
from tldist.export.compare import compare
from tldist.export.profile import Tolerances
from tldist.runtime.package import LOGITS
from tldist.runtime.reference import Reference
from tldist.runtime.session import Session

FORMAT = "tldist.parity/1"
BATCHES = (1, 2, 7)
"""Batch sizes at which every sample is run: alone, even, and odd with an incomplete last batch."""


@dataclass(frozen=True)
class Verdict:
    """What was compared, and whether it agrees.

    Attributes:
        against: what the package was compared with, in words.
        agreements: one an output.
        groups: (name, number) of the samples.
        provider: that ran the graph.
        problems: whatever else makes it fail: hashes, records that contradict each other.
    """

    against: str
    agreements: tuple[Agreement, ...]
    groups: tuple[tuple[str, int], ...]
    provider: str
    problems: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every output agrees and nothing else is wrong."""
        return bool(self.agreements) and not self.problems and all(part.passed for part in self.agreements)

    def to_dict(self, *, pairs: bool = True) -> dict[str, Any]:
        """As plain JSON data; the pairs of values are for the report alone."""
        outputs = [part.to_dict() for part in self.agreements]
        if not pairs:
            outputs = [{name: value for name, value in part.items() if name != "pairs"} for part in outputs]
        return {
            "parity": "PASS" if self.passed else "FAIL",
            "against": self.against,
            "provider": self.provider,
            "batches": list(BATCHES),
            "samples": dict(self.groups),
            "outputs": outputs,
            "problems": list(self.problems),
        }

    def to_text(self) -> str:
        """A table for people; its last line is ``parity: PASS`` or ``parity: FAIL``."""
        counts = ", ".join(f"{count} {name}" for name, count in self.groups)
        lines = [f"compared with {self.against} on {self.provider}: {counts}; batch {_list(BATCHES)}"]
        lines += _table(self.agreements)
        for part in self.agreements:
            lines += [f"warning: {part.output}: {warning}" for warning in part.warnings]
            lines += [f"fault: {part.output}: {fault}." for fault in part.faults]
        lines += [f"fault: {problem}" for problem in self.problems]
        return "\n".join([*lines, f"parity: {'PASS' if self.passed else 'FAIL'}"])


def judge(session: Session, reference: Reference, tolerances: Tolerances) -> tuple[Agreement, ...]:
    """Run a graph on the reference samples at every batch size, and compare each output."""
    images = reference.samples.images
    answers = [_run_in_batches(session, images, size) for size in BATCHES]
    groups = np.tile(reference.samples.group_of, len(BATCHES))
    agreements = []
    for name in session.outputs:
        expected = reference.expected[name]
        referee = reference.referee.get(name)
        agreements.append(
            compare(
                name,
                np.tile(expected, (len(BATCHES), 1)),
                np.concatenate([answer[name] for answer in answers]),
                groups,
                tolerances,
                referee=None if referee is None else np.tile(referee, (len(BATCHES), 1)),
                decides=name == LOGITS,
            )
        )
    return tuple(agreements)


def _run_in_batches(session: Session, images: np.ndarray, size: int) -> dict[str, np.ndarray]:
    parts = [session.run(images[start : start + size]) for start in range(0, len(images), size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}


def _table(agreements: Sequence[Agreement]) -> list[str]:
    if not any(part.groups for part in agreements):
        return []
    names = "output|rows|max abs|mean abs|max rel|tolerance|from|worst on|cosine|top-1|flips"
    rows = [names.split("|"), *(_row(part) for part in agreements if part.groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _row(part: Agreement) -> list[str]:
    worst = part.worst
    assert worst is not None  # it has groups
    return [
        part.output,
        str(part.rows),
        f"{part.max_absolute:.1e}",
        f"{part.mean_absolute:.1e}",
        f"{worst.max_relative:.1e}",
        f"{worst.tolerance:.1e}",
        "PyTorch's own error" if worst.widened else "profile",
        worst.name,
        f"{worst.cosine:.7f}",
        "-" if part.top1 is None else f"{part.top1:.1%}",
        "-" if part.top1 is None else str(len(part.flips)),
    ]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
