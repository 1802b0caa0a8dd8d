"""The settings of adaptation while training."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Free, Recipe

SOURCE_FREE = ("adabn", "shot")
"""Methods that need a model of the source, and none of its images."""


class TargetRecipe(DataRecipe):
    """The domain to adapt to; its labels are not needed."""

    labels: Literal["sealed", "use"] = "sealed"
    """sealed: nothing that learns or chooses can read them; the last measurement opens them once, and says
    so. use: they choose the epoch, and whether adaptation pays; they are not learned from (data= is for
    that)."""


class AdaptRecipe(Recipe):
    """Adapt to a target domain without labels, beside what is learned from the labelled source (data=)."""

    shorthand: ClassVar[str] = "method"

    method: str | None = None
    """deep_coral, dan (the features of both domains brought together), dann, cdan, mcd (against an opponent),
    mcc, bnm (sure and diverse answers), adabn (BatchNorm statistics of the target, no training), shot (from a
    model of the source alone), or package.module:function; none: no adaptation."""
    target: TargetRecipe | None = None
    """The target domain; its train split is adapted to, its test split is measured on, once, at the end."""
    weight: float | None = Field(default=None, ge=0)
    """Of the method's loss against that of the labels, or of the reversed gradient; none: the method's own
    (deep_coral 100, else 1)."""
    schedule: Literal["auto", "constant", "rise"] = "auto"
    """How the weight goes: constant; rise: from 0 to 1 as 2 / (1 + exp(-10 p)) - 1, where p is the share of
    samples seen (arXiv:1505.07818); auto: rise for dann, cdan and mcd."""
    batchnorm: Literal["together", "apart"] = "together"
    """together: source and target pass through BatchNorm as one batch, and both are remembered; apart: each
    is normalised by its own batch, and the target's statistics alone are remembered and stored."""
    hidden: int = Field(default=1024, ge=1)
    """Width of the discriminator's two hidden layers (dann, cdan)."""
    random_products: int = Field(default=4096, ge=1)
    """cdan: where features times classes are more than this, so many random products stand for them
    (arXiv:1705.10667, eq. 5)."""
    entropy: bool = True
    """cdan: images of which the model is sure count more in the discriminator's loss (CDAN+E)."""
    temperature: float = Field(default=2.5, gt=0)
    """mcc: of the answers whose confusion is measured."""
    pseudo_labels: float = Field(default=0.3, ge=0)
    """shot: the weight of the cross-entropy with its pseudo-labels, made anew before each epoch; 0: none."""
    candidates: int = Field(default=5, ge=1)
    """So many epochs, spread evenly and the last among them, may become the result: their checkpoints
    stay."""
    source_only: Free[Path | None] = None
    """A finished run of the same settings without adapt.*, taken for source-only; none: it is trained first,
    in RUN/source_only."""
    scorers: tuple[str, ...] = ()
    """What chooses among them and source-only without labels of the target, by rank: entropy, snd, im, bnm,
    dev, iw, mixval_intra, mixval_inter; none: all of them."""

    @property
    def is_on(self) -> bool:
        """Whether anything is adapted."""
        return self.method is not None

    @property
    def is_source_free(self) -> bool:
        """Whether it goes on from a model of the source, without its images."""
        return self.method in SOURCE_FREE

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        if (self.method is None) != (self.target is None):
            missing = "adapt.method=NAME" if self.method is None else "adapt.target=D"
            raise ValueError(f"adaptation needs a method and a target domain: {missing} is missing")
        return self
