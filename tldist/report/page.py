"""A page as plain data, and its rendering: everything that was read is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tldist import __version__

TEMPLATE = "page.html"


@dataclass(frozen=True)
class Picture:
    """A picture that this package drew (`tldist.pictures`): the one thing that is not escaped."""

    svg: str
    caption: str

    @property
    def markup(self) -> Markup:
        """The SVG as it is: texts in it were escaped when it was drawn."""
        return Markup(self.svg)


@dataclass(frozen=True)
class Table:
    """Rows of text below column names; cells of columns in ``words`` are not numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)


@dataclass(frozen=True)
class Confusion:
    """Counts by true (rows) and predicted (columns) class."""

    caption: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]

    def share(self, row: int, column: int) -> float:
        """The share of a true class that was taken for another, 0 to 1."""
        return self.counts[row][column] / max(1, sum(self.counts[row]))


@dataclass(frozen=True)
class Section:
    """One run on the page.

    Attributes:
        title: its name.
        kind: what it is, in words.
        path: where it was found.
        status: done, failed, PASS, ...
        good: whether the status is one to be glad about; None: neither.
        headline: its one figure, for the navigation.
        facts: (name, value) pairs.
        notes: sentences.
        settings: the recipe and the like, as text.
    """

    title: str
    kind: str
    path: str
    status: str = ""
    good: bool | None = None
    headline: str = ""
    facts: Sequence[tuple[str, str]] = ()
    notes: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    confusions: Sequence[Confusion] = ()
    settings: Sequence[tuple[str, str]] = field(default=())

    @property
    def mark(self) -> Literal["good", "bad", "plain"]:
        """How the status is shown."""
        return "plain" if self.good is None else "good" if self.good else "bad"


def render(title: str, sections: Sequence[Section], made_at: str) -> str:
    """The page as HTML: no script, no address of anything outside it."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files(__package__).joinpath(TEMPLATE).read_text("utf-8"))
    return template.render(title=title, sections=sections, made_at=made_at, version=__version__)
