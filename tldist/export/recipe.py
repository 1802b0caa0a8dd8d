"""The settings of ``tldist export`` and ``tldist parity``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Free, Recipe

OUTPUTS: dict[str, tuple[str, ...]] = {
    "logits": ("logits",),
    "probabilities": ("logits", "probabilities"),
    "features": ("features",),
    "both": ("logits", "features"),
}
"""The outputs of the graph for each value of ``output``: a classifier's first one is always the logits."""


class ExportRecipe(Recipe):
    """Turn a bundle into an ONNX package, gated by parity."""

    inputs: ClassVar[tuple[str, ...]] = ("bundle",)

    bundle: Free[str]
    """The bundle to export: its folder, or the run that holds it. It may move: its content identifies it."""
    profile: Free[str] = "cpu-fp32"
    """What the package is made for (precision, execution provider, tolerances): the name of a file in
    export/profiles/, or the path of your own YAML file."""
    out: Free[Path]
    """The package folder to write. Nothing is left there where parity fails."""
    output: Literal["logits", "probabilities", "features", "both"] = "logits"
    """What the graph gives: logits; logits and probabilities; features (N, D) that the head reads; or both
    logits and features."""
    data: DataRecipe | None = None
    """A domain to take real samples from, for parity; none: generated pictures take their place."""
    samples: int = Field(default=16, ge=1, le=256)
    """How many pictures of the domain are compared, and stored in the package so that parity can be checked
    again where it serves."""
    trust_code: Free[bool] = False
    """Run code that the bundle names (package.module:function)."""


class ParityRecipe(Recipe):
    """Compare a package with its bundle, or with the samples stored in it."""

    inputs: ClassVar[tuple[str, ...]] = ("models*",)

    models: tuple[str, ...]
    """BUNDLE PACKAGE: against PyTorch. PACKAGE alone: against the samples stored in it, without torch."""
    data: DataRecipe | None = None
    """A domain to compare on, at most 64 of its pictures unless data.limit says otherwise (with a bundle
    only); none: the samples stored in the package."""
    trust_code: Free[bool] = False
    """Run code that the bundle names (package.module:function)."""

    @model_validator(mode="after")
    def _check_models(self) -> Self:
        if len(self.models) not in (1, 2):
            raise ValueError(f"expected BUNDLE PACKAGE, or PACKAGE alone; found {len(self.models)} inputs")
        if len(self.models) == 1 and self.data is not None:
            raise ValueError("data= needs the bundle too: tldist parity BUNDLE PACKAGE data=D")
        return self
