"""The verdict on a package, as plain data and as a table for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tldist.export.agreement import Agreement, Resize, Source
from tldist.export.departure import Departure
from tldist.export.judge import BATCHES

FORMAT = "tldist.parity/1"
_SHOWN = 5
"""Flipped decisions that are named."""


@dataclass(frozen=True)
class Verdict:
    """What was compared, and whether it agrees.

    Attributes:
        against: what the package was compared with, in words.
        agreements: one an output.
        groups: (name, number) of the samples.
        provider: that ran the graph.
        problems: whatever else makes it fail: hashes, records that contradict each other, skew.
        ids: a name for each sample, for the decisions that flipped; empty: numbers will do.
        notes: what else a person should know; none makes it fail.
        files: how many files were compared from their bytes on, through both pipelines.
        resize: how a graph that takes whole pictures resizes them; None for others.
        departure: the first node whose output departs, where it was looked for and found.
    """

    against: str
    agreements: tuple[Agreement, ...]
    groups: tuple[tuple[str, int], ...]
    provider: str
    problems: tuple[str, ...] = ()
    ids: tuple[str, ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    files: int = 0
    resize: Resize | None = None
    departure: Departure | None = None

    @property
    def passed(self) -> bool:
        """Whether every output agrees and nothing else is wrong."""
        return bool(self.agreements) and not self.problems and self.values_agree

    @property
    def values_agree(self) -> bool:
        """Whether every output agrees, whatever else is wrong."""
        return all(part.passed for part in self.agreements) and not (self.resize and self.resize.fault)

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
            "files_compared": self.files,
            "outputs": outputs,
            "problems": list(self.problems),
            "resize": self.resize.to_dict() if self.resize else None,
            "notes": list(self.notes),
            "departure": self.departure.to_dict() if self.departure else None,
        }

    def to_text(self) -> str:
        """A table for people; its last line is ``parity: PASS`` or ``parity: FAIL``."""
        counts = ", ".join(f"{count} {name}" for name, count in self.groups)
        lines = [f"compared with {self.against} on {self.provider}: {counts}; batch {_list(BATCHES)}"]
        if self.files:
            lines.append(f"{self.files} files were read from their bytes on by training and by serving")
        if self.resize:
            lines.append(self.resize.to_text())
        lines += _table(self.agreements)
        for part in self.agreements:
            lines += _flips(part, self.ids)
            lines += [f"warning: {part.output}: {warning}" for warning in part.warnings]
            lines += [f"fault: {part.output}: {fault}." for fault in part.faults]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"fault: {problem}" for problem in self.problems]
        lines += self.departure.to_text().splitlines() if self.departure else []
        return "\n".join([*lines, f"parity: {'PASS' if self.passed else 'FAIL'}"])


def _flips(part: Agreement, ids: Sequence[str]) -> Iterator[str]:
    """The decisions that flipped, those with the largest margins first."""
    ranked = sorted(part.flips, key=lambda flip: (flip.known, -flip.margin))
    for flip in ranked[:_SHOWN]:
        name = ids[flip.sample] if ids else f"sample {flip.sample}"
        which = "" if flip.label is None else f" class {flip.label}"
        yield (
            f"flipped: {part.output}: {name} ({flip.group}){which}: {flip.expected} became {flip.found}, "
            f"margin {flip.margin:.1e}{', as when it was made' if flip.known else ''}"
        )
    if len(ranked) > _SHOWN:
        yield f"flipped: {part.output}: {len(ranked) - _SHOWN} more"


def _table(agreements: Sequence[Agreement]) -> list[str]:
    if not any(part.groups for part in agreements):
        return []
    names = "output|rows|max abs|mean abs|max rel|tolerance|from|worst on|cosine|top-1|flips|neighbours"
    rows = [names.split("|"), *(_row(part) for part in agreements if part.groups)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


_SOURCES: dict[Source, str] = {
    "profile": "profile",
    "own error": "PyTorch's own error",
    "logits": "the logits'",
    "resize": "the resize",
}


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
        _SOURCES[worst.source],
        worst.name,
        f"{worst.cosine:.7f}",
        "-" if part.top1 is None else f"{part.top1:.1%}",
        "-" if part.top1 is None else str(len(part.flips)),
        "-" if part.neighbours is None else f"{part.neighbours:.1%} of {part.k}",
    ]


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
