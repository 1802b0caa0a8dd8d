"""The settings of ``method=distill``."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.data.recipe import ViewRecipe
from tldist.recipe import Extendable, Recipe
from tldist.training.recipe import CheckpointRecipe


class DistillAugmentRecipe(ViewRecipe):
    """What changes an image from epoch to epoch; teachers and student see the same pixels."""

    shorthand: ClassVar[str] = "use"

    use: bool = True
    """false: the image as in evaluation, each time the same; the teachers then run once an image, not once an
    epoch."""

    @property
    def is_deterministic(self) -> bool:
        """Whether an image always looks the same."""
        return not self.use or super().is_deterministic


class DistillRecipe(Recipe):
    """How the student learns from the teachers."""

    shorthand: ClassVar[str] = "model"

    model: str | None = None
    """The student: a torchvision name (`tldist models`), timm/NAME, a bundle or run to go on from, or
    package.module:function; none: the first teacher's architecture and weights."""
    weights: str = "default"
    """The student's start: default (the zoo's best pre-trained ones, or the bundle's own), none (random), the
    name of torchvision's enum, a .safetensors file, or a .pth that holds nothing but weights."""
    image_size: int | None = Field(default=None, ge=8)
    """Pixels of the student's square input; none: what its weights were made with. The teachers see the same
    pixels, resized to their own inputs."""
    temperature: float = Field(default=4.0, gt=0)
    """Teachers' and student's logits are divided by it before the softmax that they are compared in
    (arXiv:1503.02531): the higher, the more the unlikely classes count."""
    labels_share: float = Field(default=0.5, ge=0, le=1)
    """The share of the loss that an image's label has, where it has one; the rest is the teachers'. Without a
    label all is theirs."""
    features: float = Field(default=0.0, ge=0)
    """Weight of the squared error between a learned projection of the student's features and the teachers'
    standardised ones, what their heads read (FitNets, arXiv:1412.6550); 0: features are not compared."""
    epochs: Extendable[int] = Field(default=5, ge=1)
    """Passes over the train split."""
    batch_size: int = Field(default=64, ge=1)
    """Images in one step over all processes together, whatever their number."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Cut each process's share of a step into this many pieces, to fit its memory."""
    lr: float = Field(default=1e-3, gt=0)
    """The highest learning rate (AdamW), reached after the warm-up; then half a cosine to 0."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled (arXiv:1711.05101); not applied to biases and norms."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """The share of all samples during which the learning rate rises."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; none: no clipping."""
    validation: float = Field(default=0.1, ge=0, lt=1)
    """The share of the images that is held out to choose the best weights, where the domain has no val split:
    by accuracy where they have labels, else by the distillation loss. 0: none, and the last are kept."""
    select: Literal["best", "last"] = "best"
    """Which weights become the bundle: the best on validation, or the last."""
    calibrate: bool = True
    """Fit a temperature on labelled validation (arXiv:1706.04599), stored in the bundle: probabilities use
    it."""
    augment: DistillAugmentRecipe = DistillAugmentRecipe()
    cache: Literal["auto", "off"] = "auto"
    """auto: where an image looks the same each time (augment=false, or augment.views), the teachers' outputs
    are computed once and kept in RUN/work; off: the teachers run on every batch."""
    cache_dtype: Literal["fp32", "fp16"] = "fp32"
    """fp16 takes half the space and rounds the teachers' outputs to 11 bits of precision."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: the fastest of fp32 and bf16 for the student, by a short trial; the teachers compute in the
    same."""
    channels_last: Literal["auto", "true", "false"] = "auto"
    """The memory layout of images and kernels; auto: by the same trial, or true on a GPU."""
    checkpoint: CheckpointRecipe = CheckpointRecipe()

    @model_validator(mode="after")
    def _check_views(self) -> Self:
        if self.augment.views is not None and not self.augment.use:
            raise ValueError("augment.views fixes augmented views, and augment=false asks for none")
        return self
