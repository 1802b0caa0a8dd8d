"""Profiles: what an export is made for. One YAML file each, found by name or by path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tldist.errors import RecipeError, close_matches
from tldist.recipe import Recipe, read_yaml
from tldist.share import find_shared

BF16_OPSET = 22
"""The first ONNX operator set in which a convolution takes bf16."""


class Tolerances(Recipe):
    """How far a package may be from its bundle. Each output is held to all of them."""

    max_relative: float = Field(gt=0, le=1)
    """Largest error of any value, relative to the largest value of that output on the group of samples."""
    min_cosine: float = Field(gt=0, le=1)
    """Smallest cosine between the two vectors of any sample."""
    max_flipped: float = Field(ge=0, le=1)
    """Share of samples whose decision (largest logit; for multilabel, the sign of each) may change; exact
    ties are not decisions."""
    max_mean: float = Field(default=1.0, gt=0, le=1)
    """Largest mean error, relative like max_relative. For int8, where max_relative must be wide."""
    tie_margin: float = Field(default=0.0, ge=0, le=1)
    """A decision that PyTorch makes by no more than this, relative like max_relative, is a tie: either
    answer is right."""
    min_neighbours: float = Field(default=0.0, ge=0, le=1)
    """For features: smallest share of the 10 nearest neighbours of a picture among the others, by cosine,
    that must be the same (the mean over the pictures; 21 of them at least, or it is not judged)."""
    max_drift: float | None = Field(default=None, gt=0, le=1)
    """Largest difference between the answers of a machine that serves and those recorded where the package
    was made, relative like max_relative; none: max_relative."""
    extremes: Literal["held", "reported"] = "held"
    """Whether black, white and noise images are held to the tolerances, or only to finite values (int8 clips
    what calibration never saw)."""


class Quantization(Recipe):
    """How float32 becomes int8 (static quantisation, QDQ format)."""

    method: Literal["minmax", "entropy", "percentile"] = "minmax"
    """How the range of each activation is found from the calibration images."""
    percentile: float = Field(default=99.99, gt=50, le=100)
    """Of the values, for method=percentile."""
    samples: int = Field(default=128, ge=1)
    """Calibration images."""
    activation: Literal["uint8", "int8"] = "uint8"
    """Type of the activations: the one that the provider is fast with (CPU: uint8; CUDA, TensorRT: int8)."""
    per_channel: bool = True
    """One scale for each output channel of a weight, instead of one for all of it."""
    reduce_range: bool = False
    """Seven bits for weights, for x86 machines without VNNI, where sums of full int8 products saturate."""
    exclude: tuple[str, ...] = ()
    """Operator types or node names that stay float32, beside those found by measuring."""
    budget: float = Field(default=0.01, ge=0, le=1)
    """Share of decisions that may flip; while more do, the layer that costs most goes back to float32."""


class Profile(Recipe):
    """What an export is made for."""

    name: str
    """Its file's name; given by the file, not in it."""
    precision: Literal["fp32", "fp16", "bf16", "int8"] = "fp32"
    """Of the graph's weights and arithmetic."""
    keep_fp32: tuple[str, ...] = ()
    """Operator types or node names that stay float32 in fp16 and bf16, beside those found by measuring."""
    quantization: Quantization = Quantization()
    """For precision int8."""
    opset: int | None = Field(default=None, ge=18)
    """ONNX operator set; none: the exporter's default."""
    provider: str = "CPUExecutionProvider"
    """ONNX Runtime's name of the execution provider that runs it, for parity and when it serves."""
    provider_options: dict[str, str] = Field(default_factory=dict)
    """As ONNX Runtime documents them for the provider."""
    max_cpu_nodes: int = Field(default=0, ge=0)
    """Nodes that another provider than the CPU's may leave to the CPU, beside the arithmetic of shapes."""
    tolerances: Tolerances

    @model_validator(mode="after")
    def _check_opset(self) -> Self:
        if self.precision == "bf16" and (self.opset is None or self.opset < BF16_OPSET):
            raise ValueError(
                f"precision: bf16 needs opset: {BF16_OPSET} (the first one in which Conv takes bf16)"
            )
        return self


def find_profile(profile: str) -> Profile:
    """Read a profile.

    Args:
        profile: a name (``cpu-fp32``), or the path of a YAML file.

    Raises:
        RecipeError: unknown, or malformed.
    """
    is_path = profile.endswith((".yaml", ".yml")) or os.sep in profile
    shipped = find_shared("export/profiles")
    path = Path(profile) if is_path else shipped / f"{profile}.yaml"
    if not path.is_file():
        if is_path:
            raise RecipeError(f"{path}: no such profile file.")
        known = [file.stem for file in shipped.glob("*.yaml")]
        raise RecipeError(f"unknown profile '{profile}'. {close_matches(profile, known)}")
    try:
        return Profile.make(**{**read_yaml(path), "name": path.stem})
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
