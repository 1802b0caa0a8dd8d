"""What the description of a composite must look like: plain data, read strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tldist.bundle import Task
from tldist.errors import BundleError
from tldist.runtime.preprocess import Preprocessing

COMPOSITES = ("ensemble", "concat")
"""The types of descriptions that hold other descriptions side by side."""

Combine = Literal["logits", "probabilities", "stacking"]

_MOST_MEMBERS = 256
_LARGEST_SIDE = 8192  # pixels; a resize is a matrix of (side, side)
_MOST_OUTPUTS = 10_000_000

Layout = TypeVar("Layout", bound="_Strict")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Input(_Strict):
    """What a model takes: pixels, and the normalisation of each RGB channel in units of [0, 1]."""

    height: int = Field(ge=1, le=_LARGEST_SIDE)
    width: int = Field(ge=1, le=_LARGEST_SIDE)
    mean: list[float] = Field(min_length=3, max_length=3)
    std: list[float] = Field(min_length=3, max_length=3)

    @model_validator(mode="after")
    def _check_numbers(self) -> Self:
        if not (all(abs(x) < 1e6 for x in self.mean) and all(1e-6 < x < 1e6 for x in self.std)):
            raise ValueError("mean and std must be finite, std positive")
        return self

    @classmethod
    def of(cls, how: Preprocessing) -> Input:
        """The part of a preprocessing that the model itself depends on."""
        return cls(height=how.height, width=how.width, mean=list(how.mean), std=list(how.std))


class VoterLayout(_Strict):
    """A member of an ensemble.

    Attributes:
        model: its description.
        input: what it takes.
        rows: for each class of the ensemble, the place of its output; -1: the member does not know it.
        temperature: its logits are divided by it before they become probabilities.
    """

    model: dict[str, Any]
    input: Input
    rows: list[int] = Field(min_length=1, max_length=_MOST_OUTPUTS)
    temperature: float = Field(gt=0, lt=1e6)

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        known = [row for row in self.rows if row >= 0]
        if min(self.rows) < -1 or len(set(known)) != len(known) or not known:
            raise ValueError("rows must be -1 or places of outputs, each once, and not all of them -1")
        return self


class EnsembleLayout(_Strict):
    """``{"type": "ensemble", ...}``: several models, whose answers are averaged."""

    type: Literal["ensemble"]
    task: Task
    combine: Combine
    input: Input
    members: list[VoterLayout] = Field(min_length=1, max_length=_MOST_MEMBERS)

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        _check_inputs(self.members)
        if len({len(member.rows) for member in self.members}) > 1:
            raise ValueError("rows must have one entry a class of the ensemble, in every member alike")
        unknown = [k for k, rows in enumerate(zip(*(m.rows for m in self.members))) if max(rows) < 0]
        if unknown:
            raise ValueError(f"no member knows the class at place {unknown[0]}")
        return self


class BranchLayout(_Strict):
    """A member of a concatenation: its description, its input, and the width of what its head reads."""

    model: dict[str, Any]
    input: Input
    features: int = Field(ge=1, le=_MOST_OUTPUTS)


class MapLayout(_Strict):
    """A map of features, as `tldist.models.chain` builds it; or the linear head."""

    type: Literal["affine", "scale", "linear"]
    width: int = Field(ge=1, le=_MOST_OUTPUTS, alias="in")
    out: int = Field(ge=1, le=_MOST_OUTPUTS)


class ConcatLayout(_Strict):
    """``{"type": "concat", ...}``: the features of several models side by side, and one head."""

    type: Literal["concat"]
    input: Input
    members: list[BranchLayout] = Field(min_length=1, max_length=_MOST_MEMBERS)
    transforms: list[MapLayout] = Field(max_length=64)
    head: MapLayout

    @model_validator(mode="after")
    def _check_members(self) -> Self:
        _check_inputs(self.members)
        if self.head.type != "linear" or any(part.type == "linear" for part in self.transforms):
            raise ValueError("the head, and nothing but the head, is linear")
        width = sum(member.features for member in self.members)
        for part in (*self.transforms, self.head):
            if part.width != width:
                raise ValueError(f"a {part.type} part reads {part.width} features where there are {width}")
            if part.type == "scale" and part.out != width:
                raise ValueError("a scale part gives as many features as it reads")
            width = part.out
        return self


def _check_inputs(members: list[VoterLayout] | list[BranchLayout]) -> None:
    """A member that is a composite itself says twice what it takes."""
    for member in members:
        own = input_of(member.model)
        if own is not None and own != member.input.model_dump():
            raise ValueError("a member that is a composite has another input than it is given")


def input_of(description: Mapping[str, Any]) -> dict[str, Any] | None:
    """The input that a description fixes: of a composite, or of a chain on one; None: any.

    Raises:
        KeyError, TypeError: the description is malformed.
    """
    kind = description.get("type")
    if kind == "chain":
        return input_of({"type": "network", **description["backbone"]})
    found: dict[str, Any] | None = description["input"] if kind in COMPOSITES else None
    return found


def read_layout(kind: type[Layout], description: Mapping[str, Any]) -> Layout:
    """Check a description and read it.

    Raises:
        BundleError: malformed; names the first thing that is wrong.
    """
    try:
        return kind.model_validate(dict(description))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "as a whole"
        raise BundleError(
            f"malformed model description: {description.get('type')}: {where}: {first['msg']}."
        ) from error
