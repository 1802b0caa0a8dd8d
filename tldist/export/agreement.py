"""The figures of a comparison as plain data: of one group of samples, of one output."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Source = Literal["profile", "own error", "logits", "resize"]
"""Where a tolerance comes from."""
WIDEST = 0.05
"""A group of samples that needs a wider tolerance than the profile's and this one proves nothing: on it,
PyTorch disagrees with itself."""


@dataclass(frozen=True)
class GroupAgreement:
    """The agreement of one output on one group of samples.

    Attributes:
        name: of the group.
        rows: comparisons made.
        magnitude: the largest absolute value that PyTorch gave; 1 for probabilities.
        max_relative: the largest error, relative to the magnitude.
        mean_relative: the mean error, relative to the magnitude.
        cosine: the smallest between the two vectors of a sample.
        own_error: ``max_relative`` of PyTorch in float32 against float64; None where not known.
        own_cosine: ``cosine`` of the same two.
        tolerance: that ``max_relative`` is held to.
        source: of the tolerance: the profile; PyTorch's own error, where that is larger; for
            probabilities, what the tolerance of the logits lets them be; for pictures that the graph
            resizes, what rounding to grey levels does.
        max_mean: that ``mean_relative`` is held to.
        min_cosine: that ``cosine`` is held to; -1 for probabilities.
        tie: a decision by no more than this share of the magnitude is none: either answer is right.
        judged: whether it is held to its tolerances, or must be finite only (extremes of some profiles).
        drift: the largest difference from what the package answered where it was made, relative to the
            magnitude; None where that is not known.
        max_drift: that ``drift`` is held to.
    """

    name: str
    rows: int
    magnitude: float
    max_relative: float
    mean_relative: float
    cosine: float
    own_error: float | None
    own_cosine: float
    tolerance: float
    source: Source
    max_mean: float
    min_cosine: float
    tie: float = 0.0
    judged: bool = True
    drift: float | None = None
    max_drift: float | None = None

    @property
    def widened(self) -> bool:
        """Whether the tolerance comes from PyTorch's own error instead of the profile."""
        return self.source == "own error"

    @property
    def proves(self) -> bool:
        """Whether PyTorch agrees with itself well enough to be compared with."""
        return not self.widened or self.tolerance <= WIDEST

    @property
    def counts(self) -> bool:
        """Whether its figures are part of the verdict."""
        return self.judged and self.proves

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "widened": self.widened}


@dataclass(frozen=True)
class Flip:
    """A decision that changed, at one batch size or more.

    Attributes:
        sample: whose decision it is, by number.
        group: of samples that it belongs to.
        expected, found: positions of the largest logit; for multilabel, whether the class is there (1, 0).
        margin: by how much PyTorch prefers the expected one, relative to the group's magnitude.
        known: it had flipped when the package was made, and was allowed.
        label: for multilabel, the position of the class.
    """

    sample: int
    group: str
    expected: int
    found: int
    margin: float
    known: bool = False
    label: int | None = None


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
        top1: share of samples whose decision is the same at every batch size (for multilabel, of samples
            and classes), on the groups that are judged; None for an output that decides nothing.
        flips: decisions that changed; ties left out.
        flipped: share of decisions that changed when those known before and ties are left out.
        neighbours: share of the nearest neighbours among the pictures that are the same; None where the
            output is no embedding, or the pictures are too few.
        k: how many neighbours; None likewise.
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
    flipped: float | None = None
    neighbours: float | None = None
    k: int | None = None
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
        counted = [group for group in self.groups if group.counts] or list(self.groups)
        return max(counted, key=lambda group: group.max_relative / group.tolerance, default=None)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data; the figures of the worst group stand beside those of all."""
        worst = self.worst.to_dict() if self.worst else {}
        names = ("max_relative", "tolerance", "own_error", "widened", "cosine", "magnitude")
        return {
            **asdict(self),
            "groups": [group.to_dict() for group in self.groups],
            **{name: worst.get(name) for name in names},
            "worst_group": worst.get("name"),
            "passed": self.passed,
        }


@dataclass(frozen=True)
class Resize:
    """How the resize and crop inside a graph agree with those of training, on whole pictures.

    Attributes:
        pictures: that were compared.
        most: the largest difference in grey levels, of 255.
        mean: the mean difference in grey levels.
        changed: share of values that differ.
    """

    pictures: int
    most: int
    mean: float
    changed: float

    @property
    def fault(self) -> str:
        """Why it fails: both round to whole grey levels, so that one is what they may differ by."""
        return "" if self.most <= 1 else f"the graph's resize is {self.most} grey levels off, 1 is allowed"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "fault": self.fault}

    def to_text(self) -> str:
        """A line for people."""
        words = (
            f"resize in the graph, {self.pictures} pictures: at most {self.most} of 255 grey levels off, "
            f"{self.mean:.1e} in the mean, {self.changed:.2%} of the values differ"
        )
        return f"fault: {self.fault} ({words})" if self.fault else words
