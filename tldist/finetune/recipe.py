"""The settings of ``tldist finetune``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.adaptation.recipe import AdaptRecipe
from tldist.data.recipe import ViewRecipe
from tldist.domain.recipe import DataRecipe
from tldist.recipe import Extendable, Free, Recipe
from tldist.training.recipe import CheckpointRecipe

_WHAT = re.compile(r"head|all|last:\d+|re:.+")


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
    """The share of all samples during which the learning rate rises."""
    schedule: Literal["cosine", "linear", "one_cycle", "constant"] = "cosine"
    """After a linear warm-up from 0: half a cosine to 0, a line to 0, or no change; one_cycle: a cosine up
    from lr/25 and one down to lr/250,000 (arXiv:1708.07120). Counted in samples, whatever the processes."""
    layer_decay: float | None = Field(default=None, gt=0, le=1)
    """Each block below the head learns at this multiple of the rate of the block above it
    (arXiv:2003.10555); none: all at the same rate."""
    l2_sp: float = Field(default=0.0, ge=0)
    """Pull the backbone's weights towards where they started, with this strength, in the place of its weight
    decay (L2-SP, arXiv:1802.01483)."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the whole gradient; none: no clipping."""


class AugmentRecipe(ViewRecipe):
    """What changes an image from epoch to epoch; derived from (seed, epoch, sample), never saved."""

    mixup: float = Field(default=0.0, ge=0)
    """Blend pairs of a process's images and labels with weights from Beta(a, a) (arXiv:1710.09412); 0: off.
    Which images meet depends on the number of processes."""
    cutmix: float = Field(default=0.0, ge=0)
    """Paste a part of one image into another, labels by area from Beta(a, a) (arXiv:1905.04899); 0: off. With
    mixup too, each batch takes one of both."""

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0


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


class ProbeRecipe(Recipe):
    """LP-FT (arXiv:2202.10054): a linear probe first, then fine-tuning from it, in one run."""

    shorthand: ClassVar[str] = "epochs"

    epochs: int = Field(default=0, ge=0)
    """Epochs in which the head alone learns, before what ``train`` says does; 0: none."""
    lr: float = Field(default=1e-2, gt=0)
    """The highest learning rate of the probe."""


class SweepRecipe(Recipe):
    """Many linear probes at once, over the same cached features; the best on validation is kept."""

    lr: tuple[float, ...] = ()
    """Learning rates to try; none: optimizer.lr alone."""
    weight_decay: tuple[float, ...] = ()
    """Weight decays to try, each with each learning rate; none: optimizer.weight_decay alone."""

    @property
    def is_on(self) -> bool:
        """Whether there is anything to try."""
        return bool(self.lr or self.weight_decay)


class LoraRecipe(Recipe):
    """LoRA (arXiv:2106.09685): small matrices learn beside the frozen layers, and are merged into them at the
    end: the bundle is a plain one."""

    shorthand: ClassVar[str] = "rank"

    rank: int = Field(default=0, ge=0)
    """Rank of the change of each linear, attention and convolution layer in what ``train`` says; 0: off."""
    alpha: float | None = Field(default=None, gt=0)
    """The change is scaled by alpha / rank; none: twice the rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout of the matrices' input."""


class GuardRecipe(Recipe):
    """What is checked beside the training, and reported."""

    probe: Free[Literal["auto", "on", "off"]] = "auto"
    """Measure a plain linear probe before the first step, and say so where the result is below it; auto: for
    a pre-trained model of which more than the head learns, in four epochs or more (it costs one forward pass
    over all images)."""
    duplicates: Free[Literal["auto", "on", "off"]] = "auto"
    """Look for images that lie in more than one of train, val and test, as the same file or looking the same;
    auto: in domains of up to 50,000 images."""


class FinetuneRecipe(Recipe):
    """Fit a pre-trained model to a target domain."""

    inputs: ClassVar[tuple[str, ...]] = ()

    data: DataRecipe | None = None
    """The domain to learn from: its train split learns, its val split (or a part held out) chooses the best.
    With adapt.method it is the source; adabn and shot do without it where model= is a bundle."""
    model: str
    """A torchvision name (`tldist models`), timm/NAME, a bundle or run to go on from, or
    package.module:function."""
    out: Free[Path]
    """The run folder: RUN/bundle is the result. The same command goes on where it stopped."""
    weights: str = "default"
    """default: the zoo's best pre-trained ones, or the bundle's own; none: random; the name of torchvision's
    enum (IMAGENET1K_V1); a .safetensors file, or a .pth that holds nothing but weights."""
    train: str = "all"
    """What learns: head (a linear probe), last:N (the head and N blocks; `tldist layers M` lists them), all,
    or re:PATTERN (the parameters whose names it finds). The rest is frozen, BatchNorm statistics and dropout
    too."""
    unfreeze: tuple[str, ...] = ()
    """Gradual unfreezing: EPOCH:WHAT, ..., from which epoch (counted from 0) what learns: 2:last:2,5:all."""
    probe: ProbeRecipe = ProbeRecipe()
    head: Literal["reuse", "new"] = "reuse"
    """reuse: classes that the model knows by name keep their rows; new: the whole head starts afresh."""
    epochs: Extendable[int] = Field(default=10, ge=1)
    """Passes over the train split."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better validation; none: take all epochs."""
    batch_size: int = Field(default=32, ge=1)
    """Images in one step over all processes together, whatever their number."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Cut each process's share of a step into this many pieces, to fit its memory."""
    gradient_checkpointing: Free[bool] = False
    """Compute the activations of each learning block again in the backward pass instead of keeping them."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """auto: the fastest of fp32 and bf16, by a short trial on this model and machine; written in the run and
    kept on resume."""
    channels_last: Literal["auto", "true", "false"] = "auto"
    """The memory layout of images and kernels; auto: by the same trial, or true on a GPU."""
    compile: Free[bool] = False
    """Compile what learns with torch.compile: minutes at the start, faster steps after."""
    sync_batchnorm: bool = False
    """BatchNorm over the images of all processes (GPU only)."""
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
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: a sample's loss is weighted by the inverse frequency of its class (mean weight 1)."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of the weights with this decay a step; it is what is measured and
    becomes the bundle; none: the weights themselves."""
    calibrate: bool = True
    """Fit a temperature on validation (arXiv:1706.04599), stored in the bundle: probabilities use it."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    augment: AugmentRecipe = AugmentRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    cache: CacheRecipe = CacheRecipe()
    sweep: SweepRecipe = SweepRecipe()
    lora: LoraRecipe = LoraRecipe()
    guard: GuardRecipe = GuardRecipe()
    adapt: AdaptRecipe = AdaptRecipe()
    track: Free[tuple[str, ...] | None] = ("tensorboard",)
    """Where the numbers of metrics.jsonl go too, through Accelerate: tensorboard (in RUN/tensorboard), wandb,
    mlflow, comet_ml, aim, clearml, dvclive, swanlab, trackio; none: nowhere."""
    workers: Free[int | None] = Field(default=None, ge=0)
    """Processes that decode images for each training process; none: by the number of cores."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""

    @model_validator(mode="after")
    def _check_adapt(self) -> Self:
        if self.data is None and not self.adapt.is_source_free:
            raise ValueError("data= is missing: the domain to learn from")
        if not self.adapt.is_on:
            return self
        asked = {
            "sweep.*": self.sweep.is_on,
            "augment.mixup": self.augment.mixup > 0,
            "augment.cutmix": self.augment.cutmix > 0,
            "gradient_accumulation": self.gradient_accumulation > 1,
            "compile": self.compile,
            "patience": self.patience is not None,
        }
        refused = [name for name, is_asked in asked.items() if is_asked]
        if refused:
            raise ValueError(
                f"{', '.join(refused)}: not with adapt.method, whose loss is of all images of a step in both "
                f"domains, and whose epochs the source does not judge. Leave it out"
            )
        if self.adapt.is_source_free and self.class_weights != "none":
            raise ValueError(
                f"class_weights={self.class_weights}: adapt.method={self.adapt.method} has no labels to weigh"
            )
        return self

    @model_validator(mode="after")
    def _check_train(self) -> Self:
        if not _WHAT.fullmatch(self.train):
            raise ValueError(f"train={self.train}: expected head, last:N, all or re:PATTERN")
        if self.sweep.is_on and (self.train != "head" or self.unfreeze or self.probe.epochs or self.ema):
            raise ValueError(
                "sweep.* tries linear probes: it goes with train=head, without unfreeze, probe, ema"
            )
        if self.lora.rank and (self.train == "head" or self.optimizer.l2_sp or self.sweep.is_on):
            raise ValueError(
                "lora.rank adapts the frozen blocks: it goes with train=last:N, all or re:PATTERN, "
                "and without optimizer.l2_sp and sweep.*"
            )
        for entry in self.unfreeze:
            epoch, _, what = entry.partition(":")
            if not epoch.isdecimal() or not _WHAT.fullmatch(what):
                raise ValueError(f"unfreeze={entry}: expected EPOCH:WHAT, such as 2:last:2")
        return self
