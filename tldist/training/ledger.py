"""Broken images: counted over all processes, listed in a file, an error where there are too many."""

from __future__ import annotations

import json
from pathlib import Path

from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError
from tldist.files import write_text

LEDGER = "bad_images.jsonl"


class Ledger:
    """The broken images that the processes have met in one domain.

    Args:
        domain: where they lie.
        file: the list to write, one JSON object a line; None: no list.
    """

    def __init__(self, domain: Domain, file: Path | None) -> None:
        self.domain, self.file = domain, file
        self.found: dict[int, str] = {}

    def add(self, broken: list[tuple[int, str]]) -> None:
        """Note the broken images of a batch."""
        self.found.update(broken)

    def settle(self, team: Team) -> int:
        """Agree on the broken images over all processes, write the list, and judge.

        Called by all processes together.

        Returns:
            How many there are.

        Raises:
            DomainError: more than the domain's limit; the same on every process.
        """
        for found in team.gather(self.found):
            self.found.update(found)
        count, limit = len(self.found), self.domain.max_bad
        if count and self.file is not None and team.is_main:
            lines = [
                json.dumps({"id": self.domain.id(index), "reason": reason})
                for index, reason in sorted(self.found.items())
            ]
            write_text(self.file, "\n".join(lines) + "\n")
        if count > limit * len(self.domain):
            index, reason = min(self.found.items())
            where = f" All are listed in {self.file}." if self.file else ""
            raise DomainError(
                f"{self.domain.name}: {count} of {len(self.domain)} images are broken, more than "
                f"data.max_bad={limit} allows; the first is {self.domain.id(index)} ({reason}).{where} "
                f"Repair or remove them, or raise data.max_bad."
            )
        return count
