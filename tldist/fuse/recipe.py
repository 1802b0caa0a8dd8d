"""The settings of ``tldist fuse``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.recipe import Free, Recipe


class SearchRecipe(Recipe):
    """What ``method=search`` tries."""

    methods: tuple[str, ...] | None = None
    """Only these methods; none: all that the bundles, base= and data= allow and that need no training."""
    points: int = Field(default=5, ge=2)
    """Values of each coefficient (alpha, scale, density) that are tried, evenly spread."""
    keep: int = Field(default=3, ge=1)
    """How many of the ranked results go through BatchNorm re-estimation on all of data= and are measured
    again; the others are compared with a few batches."""


class AdaMergingRecipe(Recipe):
    """How ``method=adamerging`` learns its coefficients on unlabelled target images."""

    steps: int = Field(default=500, ge=1)
    """Steps of Adam."""
    lr: float = Field(default=1e-3, gt=0)
    """Its learning rate."""
    batch_size: int = Field(default=64, ge=2)
    """Images of one step, over all processes."""
    layerwise: bool = True
    """A coefficient for each tensor of each model; false: one for each model."""


class EnsembleRecipe(Recipe):
    """How ``method=ensemble`` makes one answer of several."""

    shorthand: ClassVar[str] = "combine"

    combine: Literal["logits", "probabilities", "stacking"] = "probabilities"
    """What is averaged: the logits, the probabilities (each model's temperature applied), or the
    probabilities with shares fitted on data=: its val split where it has a test split too, else train."""
    shares: Literal["member", "class"] = "member"
    """stacking: one fitted share a model, or one for each model and class."""
    prior: float = Field(default=1.0, ge=0)
    """stacking: so many images for each model keep the fitted shares off 0; 0: none."""


class ConcatRecipe(Recipe):
    """How ``method=concat`` reads several models' features."""

    shorthand: ClassVar[str] = "projection"

    projection: int | None = Field(default=None, ge=1)
    """So many principal components of the joined features are what the head reads; none: all features."""
    ridge: float = Field(default=0.01, ge=0)
    """This multiple of a model's mean feature variance is added to its variances when they are
    standardised."""
    validation: float = Field(default=0.2, gt=0, lt=1)
    """The share of every class that chooses the head's penalty."""


class FuseRecipe(Recipe):
    """Make one model of several: in weight space, of their features, of their outputs, or by distillation."""

    inputs: ClassVar[tuple[str, ...]] = ("bundles*",)

    bundles: Free[tuple[Path, ...]] = Field(min_length=1)
    """The models to fuse: bundles, or runs that hold one; with raw=true any safetensors file or folder."""
    method: str
    """In weight space average (model soup), greedy_soup, wise_ft, slerp, multi_slerp, task_arithmetic, ties,
    dare_linear, dare_ties, breadcrumbs, model_stock, fisher, regmean, adamerging, rebasin; of any
    architectures ensemble, concat, distill; search tries them; or package.module:function."""
    out: Free[Path]
    """The run folder: RUN/bundle is the result (raw=true: RUN/weights)."""
    base: Free[Path | None] = None
    """The model that the others were fine-tuned from: the origin of task vectors."""
    data: DataRecipe | None = None
    """The target domain. Its train split gives the statistics that a method asks for (labels are not read,
    but for heads=rebuild, concat and stacking); where it has labels, every parent and the result are measured
    on its test or val split. With both, choices are made on val and the result is measured on test."""
    sources: tuple[str, ...] | None = None
    """The domains that the bundles were trained on, one each, in their order: fisher and regmean take each
    model's statistics there, search measures there too. None: fisher and regmean use data=."""
    weights: tuple[float, ...] | None = None
    """One number a bundle, not negative. Averages divide them by their sum; sums of task vectors take them as
    they are, times scale. None: all 1."""
    alpha: float = Field(default=0.5, ge=0, le=1)
    """wise_ft: 0 is the base, 1 the (average of the) fine-tuned; slerp: 0 is the first bundle, 1 the
    second."""
    curve: tuple[float, ...] | None = None
    """wise_ft and slerp: values of alpha to measure on data=; the best on validation takes the place of
    alpha."""
    scale: float | None = Field(default=None, ge=0)
    """Factor of the task vectors (lambda). None: the method's own: 1 for ties, 0.3 for adamerging, else
    0.4."""
    density: float | None = Field(default=None, gt=0, le=1)
    """Share of each task vector's entries that stay. None: the method's own: ties 0.2, dare 0.5, breadcrumbs
    0.85."""
    gamma: float | None = Field(default=None, ge=0, lt=1)
    """breadcrumbs: the share of the largest entries that go too. None: 0.01."""
    classes: Literal["union", "intersection", "target"] = "union"
    """Which classes the result answers, where the bundles know different ones: all, those that all know, or
    those of data=."""
    heads: Literal["merge", "rebuild", "separate"] = "merge"
    """merge: rows of equal class names are fused; rebuild: a new head is fitted on labelled data=; separate:
    each model's classes stand side by side, named model/class."""
    statistics: Literal["auto", "pooled", "reestimate", "repair"] = "auto"
    """Of what passes through the merged layers. pooled: BatchNorm's are those of the models together;
    reestimate: they are measured on data=; repair: layers of a network without BatchNorm are scaled and
    shifted until their outputs vary on data= as the models' do (arXiv:2211.08403); auto: reestimate where
    there are BatchNorm layers and data=."""
    recalibrate_batches: int | None = Field(default=None, ge=0)
    """At most this many batches re-estimate BatchNorm statistics; none: all there are; 0: not at all."""
    match: Literal["weights", "activations"] = "weights"
    """rebasin: whether units are matched by their weights, or by their activations on data=."""
    samples: int | None = Field(default=None, ge=1)
    """fisher, regmean, rebasin by activations, repair: at most so many images are what statistics are taken
    from. None: 256 for fisher, which needs a gradient for each image and class, else 1,024."""
    reduce: float = Field(default=0.9, ge=0, le=1)
    """regmean: factor of the inner products off the diagonal."""
    ensemble: EnsembleRecipe = EnsembleRecipe()
    """How method=ensemble makes one answer of several."""
    concat: ConcatRecipe = ConcatRecipe()
    """How method=concat reads several models' features."""
    adamerging: AdaMergingRecipe = AdaMergingRecipe()
    """How its coefficients are learned."""
    search: SearchRecipe = SearchRecipe()
    """What method=search tries."""
    distill: DistillRecipe = DistillRecipe()
    """How method=distill teaches a student; distill=NAME is its architecture."""
    raw: bool = False
    """Merge any safetensors files or folders with equal tensor names and shapes, Hugging Face's shards
    included, without knowing what they are: needs no torch."""
    shard_gb: float | None = Field(default=None, gt=0)
    """raw: split the result into files of at most so many GB, with an index; none: one file."""
    hash: Free[bool] = True
    """raw: record the BLAKE3 hash of every input (as b3sum prints it), computed beside the merge."""
    batch_size: int = Field(default=64, ge=2)
    """Images in one batch, on one process: BatchNorm statistics are those of whole batches."""
    seed: int = Field(default=0, ge=0)
    """Of the composition of those batches, of random masks and of samples."""
    workers: Free[int | None] = Field(default=None, ge=0)
    """Decoding processes for each process; none: by the number of cores."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        count = len(self.bundles)
        for name in ("weights", "sources"):
            given = getattr(self, name)
            if given is not None and len(given) != count:
                raise ValueError(f"{name}: {len(given)} for {count} bundles")
        if self.weights is not None and (min(self.weights) < 0 or sum(self.weights) <= 0):
            raise ValueError("weights: expected numbers that are not negative, and not all of them 0")
        if self.curve is not None and not all(0 <= alpha <= 1 for alpha in self.curve):
            raise ValueError("curve: expected numbers from 0 to 1")
        return self
