"""The settings of ``tldist align``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Free, Recipe

OPTIONS = ("dims", "ridge", "kind", "gamma", "strength", "iterations", "landmarks")
"""The fields that are a method's own, passed on where they are given; ``seed`` is passed on always."""


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
    """The target domain: its train split fits the map; its labels, if any, only report the accuracy, unless
    target_labels is given."""
    method: str = "coral"
    """By means and covariances, in one pass at any size: standardize (both domains to mean 0 and variance 1),
    pca, whiten, coral (the source takes the target's mean and covariance), monge (so, and moved least),
    subspace, gfk, tca kind=linear. By samples: tca, jda (classes too), mlp (learned), ot (transport). Or none
    (the head alone), or package.module:function."""
    out: Free[Path]
    """The run folder: RUN/bundle is the result."""
    dims: int | None = Field(default=None, ge=1)
    """Dimensions of the common space (pca, whiten, subspace, gfk, tca, jda, mlp); none: the method's own
    choice (what holds 95 % of the variance, or 64)."""
    ridge: float | None = Field(default=None, ge=0)
    """The strength of the method's regularisation, most often this multiple of a domain's mean variance,
    added to its variances; none: the method's own (coral 1, the paper's +I on features of unit variance)."""
    kind: str | None = None
    """A variant of the method: whiten zca|pca, tca and jda rbf|linear, mlp coral|mmd, ot entropic|emd; none:
    the method's own."""
    gamma: float | None = Field(default=None, gt=0)
    """Of the kernel exp(-gamma |x - y|^2) (tca, jda); none: 1 / the mean squared distance of two samples."""
    strength: float | None = Field(default=None, ge=0)
    """Of what brings the domains together against the loss of classes (mlp); of the penalty on classes
    (ot)."""
    iterations: int | None = Field(default=None, ge=1)
    """Rounds of guessed classes (jda), steps (mlp)."""
    landmarks: int | None = Field(default=None, ge=2)
    """Samples that a kernel is anchored at, of both domains together (tca, jda); they become part of the
    model."""
    samples: int = Field(default=20_000, ge=2)
    """Samples of each domain that are kept, chosen by a hash of (seed, id): for the head, and for methods and
    weights that read samples. Moments are taken of all."""
    target_labels: int = Field(default=0, ge=0)
    """Use the labels of so many target images of each class, in fitting the map (jda, mlp, ot) and the head,
    where together they weigh as much as the source. 0: target labels are not used."""
    head: Literal["logistic", "ncm", "knn"] = "logistic"
    """The new head: multinomial logistic regression, the nearest class mean, or the vote of the nearest
    of the kept source samples (they become part of the model)."""
    weights: Literal["none", "kmm", "density"] = "none"
    """Weigh the source's samples in refitting the head as the target would have them: kernel mean matching,
    or the ratio of densities by a logistic regression; written to RUN/weights.parquet (id, weight)."""
    validation: float = Field(default=0.2, gt=0, lt=1)
    """The share of every source class that is held out to choose the strength of the head's penalty."""
    seed: int = Field(default=0, ge=0)
    """Of that choice, of the samples that are kept, and of methods that draw at random."""
    batch_size: Free[int] = Field(default=64, ge=1)
    """Images that one process handles at once."""
    workers: Free[int | None] = Field(default=None, ge=0)
    """Decoding processes for each process; none: by the number of cores."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""

    @property
    def options(self) -> dict[str, Any]:
        """The method's options that were given."""
        return {name: getattr(self, name) for name in OPTIONS if getattr(self, name) is not None}

    @model_validator(mode="after")
    def _check_one_bundle(self) -> Self:
        if self.target_bundle is not None:
            raise ValueError(
                f"a second bundle was given ({self.target_bundle}), but heterogeneous alignment (two models) "
                f"is not supported yet by this version. Give one bundle, source= and target="
            )
        return self

    @model_validator(mode="after")
    def _check_head(self) -> Self:
        if self.head == "knn" and self.weights != "none":
            raise ValueError(
                f"head=knn takes no weights (weights={self.weights}): its samples vote by their nearness. "
                f"Choose head=logistic or head=ncm"
            )
        return self
