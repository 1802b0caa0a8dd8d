"""The settings of ``tldist align``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Free, Recipe


class AlignRecipe(Recipe):
    """Map source and target features into a common space and refit the head there, without target labels."""

    inputs: ClassVar[tuple[str, ...]] = ("bundle", "target_bundle")

    bundle: Free[Path]
    """The model whose features are aligned: a bundle, or a run that holds one."""
    target_bundle: Path | None = None
    """A second model for the target domain (heterogeneous alignment); not supported by this version."""
    source: DataRecipe
    """The source domain, with labels: its train split fits the map and the head."""
    target: DataRecipe
    """The target domain: its train split fits the map; its labels, if any, only report the accuracy."""
    method: str = "coral"
    """standardize (both domains to mean 0 and variance 1), coral (the source takes the target's mean and
    covariance), or package.module:function."""
    out: Free[Path]
    """The run folder: RUN/bundle is the result."""
    ridge: float | None = Field(default=None, ge=0)
    """This multiple of a domain's mean variance is added to its variances; none: the method's own (coral 1,
    the paper's +I on features of unit variance; standardize 0.01)."""
    validation: float = Field(default=0.2, gt=0, lt=1)
    """The share of every source class that is held out to choose the strength of the head's penalty."""
    seed: int = Field(default=0, ge=0)
    """Of that choice."""
    batch_size: Free[int] = Field(default=64, ge=1)
    """Images that one process handles at once."""
    workers: Free[int | None] = Field(default=None, ge=0)
    """Decoding processes for each process; none: by the number of cores."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""

    @model_validator(mode="after")
    def _check_one_bundle(self) -> Self:
        if self.target_bundle is not None:
            raise ValueError(
                f"a second bundle was given ({self.target_bundle}), but heterogeneous alignment (two models) "
                f"is not supported yet by this version. Give one bundle, source= and target="
            )
        return self
