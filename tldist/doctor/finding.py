"""What a check hands back: facts for people and scripts, and findings with what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """Something that a person should know.

    Attributes:
        level: ``broken`` (a stage would fail or be wrong here) or ``note`` (works, but less than it could).
        what: what was found.
        todo: what to do about it.
    """

    level: Literal["broken", "note"]
    what: str
    todo: str

    def to_dict(self) -> dict[str, str]:
        """As plain JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Check:
    """One part of the examination.

    Attributes:
        facts: plain JSON data.
        lines: the facts in words, one a line.
        findings: what is wrong, or worth knowing.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
