"""The settings of ``tldist finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Extendable, Free, Recipe


class OptimizerRecipe(Recipe):
    """How the weights move."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimiser: AdamW (arXiv:1711.05101), or SGD with Nesterov momentum."""
    lr: float = Field(default=1e-3, gt=0)
    """The highest learning rate, reached after the warm-up."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled for AdamW, L2 for SGD; not applied to biases and norms."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """SGD only."""
    warmup: float = Field(default=0.1, ge=0, lt=1)
    """The share of all samples during which the learning rate rises linearly from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: a half cosine to 0, or no change. Counted in samples, whatever the processes."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; none: no clipping."""


class AugmentRecipe(Recipe):
    """What changes an image from epoch to epoch; derived from (seed, epoch, sample), never saved."""

    crop: tuple[float, float] | None = (0.35, 1.0)
    """Train on a random part of this share of the area (least, most), resized; none: the centre, as in
    evaluation."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Least and greatest width-to-height ratio of that part."""
    flip: bool = True
    """Mirror half of the images left to right (not for digits and text)."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Scale the grey values by a random factor of up to 1 plus or minus this."""
    views: int | None = Field(default=None, ge=1)
    """Take this many fixed augmented views of each image in turn, epoch by epoch, instead of a new one each
    time: the frozen part is then computed once a view."""

    @property
    def is_deterministic(self) -> bool:
        """Whether an image always looks the same."""
        return self.crop is None and not self.flip and not self.brightness


class CacheRecipe(Recipe):
    """The frozen part, computed once: its outputs are kept on disk, and epochs read those."""

    shorthand: ClassVar[str] = "use"

    use: Literal["auto", "off"] = "auto"
    """auto: where blocks are frozen, the images do not change from epoch to epoch (augment.crop=none
    augment.flip=false, or augment.views), and it pays; off: run the frozen part in every epoch."""
    folder: Free[Path | None] = None
    """Where the files lie, shared by all runs with the same frozen part and data; none: the user's cache
    folder."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 takes half the space and rounds the features to 8 bits of precision."""
    max_gb: Free[float] = Field(default=20.0, gt=0)
    """Largest size in 10^9 bytes; a larger one is not made, and that is said."""


class CheckpointRecipe(Recipe):
    """What is saved while training, and when."""

    every_steps: Free[int | None] = Field(default=None, ge=1)
    """Save after this many steps too; a checkpoint is always saved at the end of an epoch."""
    keep: Free[int] = Field(default=2, ge=1)
    """How many of the newest checkpoints stay, besides the best."""


class FinetuneRecipe(Recipe):
    """Fit a pre-trained model to a target domain."""

    inputs: ClassVar[tuple[str, ...]] = ()

    data: DataRecipe
    """The target domain: its train split learns, its val split (or a part held out) chooses the best."""
    model: str
    """A torchvision name (`tldist models`), a bundle or run to go on from, or package.module:function."""
    out: Free[Path]
    """The run folder: RUN/bundle is the result. The same command goes on where it stopped."""
    weights: str = "default"
    """default: the zoo's best pre-trained ones, or the bundle's own; none: random; the name of torchvision's
    enum (IMAGENET1K_V1); a .safetensors file, or a .pth that holds nothing but weights."""
    train: str = "all"
    """What learns: head (a linear probe), last:N (the head and N blocks; `tldist layers M` lists them), all.
    The rest is frozen, BatchNorm statistics and dropout too."""
    head: Literal["reuse", "new"] = "reuse"
    """reuse: classes that the model knows by name keep their rows; new: the whole head starts afresh."""
    epochs: Extendable[int] = Field(default=10, ge=1)
    """Passes over the train split."""
    batch_size: int = Field(default=32, ge=1)
    """Images in one step over all processes together, whatever their number."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Cut each process's share of a step into this many pieces, to fit its memory."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: the fastest of fp32 and bf16, channels_last or not, by a short trial on this model and machine;
    written in the run and kept on resume."""
    seed: int = Field(default=0, ge=0)
    """Of everything random: order, augmentation, dropout, the new head."""
    image_size: int | None = Field(default=None, ge=8)
    """Pixels of the square input; none: what the weights were made with."""
    validation: float = Field(default=0.2, ge=0, lt=1)
    """The share of every class that is held out to choose the best, where the domain has no val split; 0:
    none, and the last weights are kept."""
    select: Literal["best", "last"] = "best"
    """Which weights become the bundle: the best on validation, or the last."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread over all classes (arXiv:1512.00567)."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    cache: CacheRecipe = CacheRecipe()
    workers: Free[int | None] = Field(default=None, ge=0)
    """Processes that decode images for each training process; none: by the number of cores."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""

    @model_validator(mode="after")
    def _check_train(self) -> Self:
        kind, _, number = self.train.partition(":")
        if self.train not in ("head", "all") and not (kind == "last" and number.isdecimal()):
            raise ValueError(f"train={self.train}: expected head, last:N or all")
        return self
