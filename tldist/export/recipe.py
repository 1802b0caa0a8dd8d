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
"""The outputs of the graph for each word of ``output``: a classifier's first one is always the logits."""
ORDER = ("logits", "probabilities", "features")
"""In which the graph gives them; those of inner layers follow."""


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
    output: tuple[Literal["logits", "probabilities", "features", "both"], ...] = ("logits",)
    """What the graph gives: logits; logits and probabilities; features (N, D) that the head reads; both
    logits and features; or several of these."""
    layers: tuple[str, ...] = ()
    """Inner layers (`tldist layers MODEL` lists them) whose features (N, D) the graph gives too, each called
    features.LAYER."""
    pool: Literal["mean", "gem", "max", "token", "flatten"] = "mean"
    """How features that have positions become one vector: their mean, generalised mean (p = 3) or maximum,
    the class token, or all of them in a row."""
    l2: bool = False
    """Divide each vector of features by its length, inside the graph."""
    input: Literal["fixed", "dynamic", "picture"] = "fixed"
    """What the graph takes, uint8 (batch, H, W, 3): images of the size that the preprocessing makes; of any
    size, computed at that size (convolutional networks); or whole pictures, resized and cropped inside the
    graph."""
    exporter: Literal["auto", "dynamo", "torchscript"] = "auto"
    """auto: PyTorch's dynamo exporter and, where it fails or its graph is wrong, the TorchScript one."""
    calibration: DataRecipe | None = None
    """Images that int8 is calibrated on; none: those of data, its training split."""
    optimize: Literal["all", "measured", "none"] = "all"
    """Steps that make the graph smaller or faster: all; all but those that do not measure faster on the
    profile's provider here; or none. The profile's precision is always kept."""
    data: DataRecipe | None = None
    """A domain to take real samples from, for parity; none: generated pictures take their place."""
    samples: int = Field(default=16, ge=1, le=4096)
    """How many pictures of the domain are compared. At most 16 of them are stored in the package, so that
    parity can be checked again where it serves."""
    trust_code: Free[bool] = False
    """Run code that the bundle names (package.module:function)."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph's outputs, in its order."""
        asked = {name for word in self.output for name in OUTPUTS[word]}
        inner = tuple(f"features.{layer}" for layer in self.layers)
        return tuple(name for name in ORDER if name in asked) + inner


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
