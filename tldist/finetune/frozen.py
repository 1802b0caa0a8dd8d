"""Whether the frozen part of a model is computed once, and the features that epochs then read."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tldist.data.augment import Augmentation
from tldist.data.loader import Batch
from tldist.data.order import StepPlan
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.features.cache import (
    FeatureCache,
    cache_bytes,
    default_folder,
    fill_cache,
    make_key,
    open_cache,
)
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.blocks import Block
from tldist.models.load import input_tensor
from tldist.models.split import CannotSplit, split_model
from tldist.runtime.preprocess import Preprocessing
from tldist.training.precision import Numerics
from tldist.training.signals import StopFlag


@dataclass(frozen=True)
class FrozenPart:
    """The part of a model that is computed once.

    Attributes:
        prefix, suffix: the model, cut where its frozen part ends.
        shape: of the features of one image.
        folder: where caches lie.
        bytes_needed: of the train and validation features.
    """

    prefix: nn.Module
    suffix: nn.Module
    shape: tuple[int, ...]
    folder: Path
    bytes_needed: int


@dataclass(frozen=True)
class CachedFeatures:
    """The features of one domain, with labels in the order of the task's classes."""

    cache: FeatureCache
    labels: np.ndarray

    def batches(self, plans: Iterable[StepPlan] | Iterable[np.ndarray]) -> Iterator[Batch]:
        """Batches of features."""
        return self.cache.batches(plans, self.labels)


def plan_frozen(
    recipe: FinetuneRecipe,
    epochs: int,
    model: nn.Module,
    blocks: list[Block],
    learning: list[Block],
    how: Preprocessing,
    images: tuple[int, int],
) -> tuple[FrozenPart | None, str]:
    """Whether to compute the frozen part once, and why or why not.

    Args:
        recipe: the settings.
        epochs: that would read the features.
        model, blocks, learning: what is frozen.
        how: the preprocessing.
        images: of the train and validation domains.

    Returns:
        The part, or None; and the reason in words for the plan.
    """
    views = recipe.augment.views or 1
    if recipe.cache.use == "off":
        return None, "every epoch (cache=off)"
    if recipe.augment.mixes:
        return None, "every epoch (mixup and cutmix mix the images themselves)"
    if not recipe.augment.is_deterministic and recipe.augment.views is None:
        return None, "every epoch (augmentation changes the images; augment.views=V fixes V views)"
    if epochs <= views:
        return None, f"every epoch (each of {views} views is read once: a cache would not pay)"
    try:
        prefix, suffix = split_model(model, blocks, learning)
    except CannotSplit as reason:
        return None, f"every epoch (the model cannot be cut: {reason})"
    shape = _output_shape(prefix, how)
    needed = sum(cache_bytes(shape, n, v, recipe.cache.dtype) for n, v in zip(images, (views, 1)))
    folder = recipe.cache.folder or default_folder()
    limit = min(recipe.cache.max_gb * 1e9, _free_bytes(folder) * 0.9)
    if needed > limit:
        return (
            None,
            f"every epoch (the cache would take {needed / 1e9:.1f} GB, the limit is {limit / 1e9:.1f})",
        )
    return FrozenPart(prefix, suffix, shape, folder, needed), f"once, {needed / 1e6:,.1f} MB in {folder}"


def load_frozen(
    part: FrozenPart,
    recipe: FinetuneRecipe,
    domain: Domain,
    classes: tuple[str, ...],
    how: Preprocessing,
    numerics: Numerics,
    team: Team,
    *,
    training: bool,
    workers: int,
    stop: StopFlag,
) -> CachedFeatures:
    """The features of a domain, from an earlier run or computed now by all processes together."""
    views = (recipe.augment.views or 1) if training else 1
    varies = training and not recipe.augment.is_deterministic
    augmentation = Augmentation.of(recipe.augment) if varies else None
    key = make_key(
        part.prefix,
        domain,
        how,
        augmentation=augmentation,
        views=views,
        seed=recipe.seed,
        numerics=numerics.precision,
        dtype=recipe.cache.dtype,
    )
    cache = team.on_main(lambda: open_cache(part.folder, key) is not None)
    found = open_cache(part.folder, key) if cache else None
    if found is None:
        compute = _compute(part.prefix, how, numerics)
        found = fill_cache(
            part.folder,
            key,
            compute,
            part.shape,
            domain,
            how,
            team,
            augmentation=augmentation,
            workers=workers,
            stop=stop,
        )
    return CachedFeatures(found, domain.labels_in(classes))


def _compute(prefix: nn.Module, how: Preprocessing, numerics: Numerics) -> Callable[[Tensor], Tensor]:
    dtype = torch.bfloat16 if numerics.precision == "bf16" else torch.float16

    @torch.no_grad()
    def compute(images: Tensor) -> Tensor:
        prefix.eval()
        with torch.autocast(images.device.type, dtype=dtype, enabled=numerics.precision != "fp32"):
            features: Tensor = prefix(input_tensor(images, how, numerics.memory_format))
        return features.float()

    return compute


@torch.no_grad()
def _output_shape(prefix: nn.Module, how: Preprocessing) -> tuple[int, ...]:
    prefix.eval()
    weight = next(prefix.parameters())
    return tuple(prefix(torch.zeros(1, 3, how.height, how.width, device=weight.device)).shape[1:])


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
