"""The settings of ``tldist fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Free, Recipe


class FuseRecipe(Recipe):
    """Merge several bundles of one architecture into one."""

    inputs: ClassVar[tuple[str, ...]] = ("bundles*",)

    bundles: Free[tuple[Path, ...]] = Field(min_length=1)
    """The models to merge: bundles, or runs that hold one."""
    method: str
    """average (model soup), wise_ft (between base= and the fine-tuned ones), or package.module:function."""
    out: Free[Path]
    """The run folder: RUN/bundle is the result."""
    base: Free[Path | None] = None
    """The model that the others were fine-tuned from; wise_ft needs it."""
    data: DataRecipe | None = None
    """The target domain: its train split re-estimates BatchNorm statistics (labels are not read); where it
    has labels, every parent and the result are measured on its test or val split."""
    weights: tuple[float, ...] | None = None
    """One number a bundle, not negative; divided by their sum. None: all equal."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """wise_ft: 0 is the base, 1 the (average of the) fine-tuned."""
    recalibrate_batches: int | None = Field(default=None, ge=0)
    """At most this many batches re-estimate BatchNorm statistics; none: all there are; 0: not at all."""
    batch_size: int = Field(default=64, ge=2)
    """Images in one batch, on one process: BatchNorm statistics are those of whole batches."""
    seed: int = Field(default=0, ge=0)
    """Of the composition of those batches."""
    workers: Free[int | None] = Field(default=None, ge=0)
    """Decoding processes for each process; none: by the number of cores."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.weights is None:
            return self
        if len(self.weights) != len(self.bundles):
            raise ValueError(f"weights: {len(self.weights)} numbers for {len(self.bundles)} bundles")
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise ValueError("weights: expected numbers that are not negative, and not all of them 0")
        return self
