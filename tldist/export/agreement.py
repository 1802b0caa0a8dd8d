"""The figures of a comparison as plain data: of one group of samples, of one output."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

WIDEST = 0.05
"""A group of samples that needs a wider tolerance proves nothing: on it, PyTorch disagrees with itself."""


@dataclass(frozen=True)
class GroupAgreement:
    """The agreement of one output on one group of samples.

    Attributes:
        name: of the group.
        rows: comparisons made.
        magnitude: the largest absolute value that PyTorch gave.
        max_relative: the largest error, relative to the magnitude.
        cosine: the smallest between the two vectors of a sample.
        own_error: ``max_relative`` of PyTorch in float32 against float64; None where not known.
        own_cosine: ``cosine`` of the same two.
        tolerance: that ``max_relative`` is held to.
        min_cosine: that ``cosine`` is held to.
        widened: whether the tolerance comes from PyTorch's own error instead of the profile.
    """

    name: str
    rows: int
    magnitude: float
    max_relative: float
    cosine: float
    own_error: float | None
    own_cosine: float
    tolerance: float
    min_cosine: float
    widened: bool

    @property
    def proves(self) -> bool:
        """Whether PyTorch agrees with itself well enough to be compared with."""
        return self.tolerance <= WIDEST


@dataclass(frozen=True)
class Flip:
    """A decision that changed.

    Attributes:
        row: of the comparison.
        group: of samples that the row belongs to.
        expected, found: positions of the largest logit.
        margin: by how much PyTorch prefers the expected one, relative to the group's magnitude.
    """

    row: int
    group: str
    expected: int
    found: int
    margin: float


@dataclass(frozen=True)
class Agreement:
    """The agreement of one output.

    Attributes:
        output: its name.
        rows: comparisons made (samples times batch sizes).
        groups: the agreement on each group of samples, pictures first; empty where nothing can be compared
            (NaN, another shape): then ``faults`` says why.
        max_absolute, mean_absolute: error in the output's units.
        spread: the largest change of a value from sample to sample, as a share of the magnitude.
        top1: share of equal decisions; None for an output that decides nothing.
        flips: decisions that changed.
        faults: why it fails; empty where it passes.
        warnings: what makes the comparison say less than it seems to.
        pairs: some pairs (PyTorch's value, package's value), for a picture.
    """

    output: str
    rows: int
    groups: tuple[GroupAgreement, ...] = ()
    max_absolute: float | None = None
    mean_absolute: float | None = None
    spread: float | None = None
    top1: float | None = None
    flips: tuple[Flip, ...] = ()
    faults: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    pairs: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    @property
    def passed(self) -> bool:
        """Whether it is within all tolerances."""
        return not self.faults

    @property
    def worst(self) -> GroupAgreement | None:
        """The group that is nearest to its tolerance, or farthest beyond it."""
        judged = [group for group in self.groups if group.proves] or list(self.groups)
        return max(judged, key=lambda group: group.max_relative / group.tolerance, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data; the figures of the worst group stand beside those of all."""
        worst = asdict(self.worst) if self.worst else {}
        names = ("max_relative", "tolerance", "own_error", "widened", "cosine", "magnitude")
        figures = {name: worst.get(name) for name in names}
        return {**asdict(self), **figures, "worst_group": worst.get("name"), "passed": self.passed}
