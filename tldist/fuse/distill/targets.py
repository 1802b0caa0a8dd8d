"""What the teachers say of each image of a batch: from a file that is computed once, or on the spot."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tldist.data.augment import Augmentation
from tldist.data.loader import Batch, load_batches
from tldist.data.order import blocks_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import ModelError
from tldist.features.cache import CacheKey, FeatureCache, cache_bytes, fill_cache, open_cache
from tldist.files import remove_leftovers
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.teachers import Layout, Teacher, answering, identity_of
from tldist.progress import warn
from tldist.runtime.preprocess import Preprocessing
from tldist.training.precision import Numerics
from tldist.training.signals import StopFlag

Teach = Callable[[Batch], Batch]
"""A batch of images to the same with rows ``[label, J logits, D features]`` in the place of labels."""

MOST_FOR_MOMENTS = 4096
"""Images that mean and spread of the teachers' features are taken from."""
_HALF_MAX = float(np.finfo(np.float16).max)


def num_views(settings: DistillRecipe) -> int:
    """How many ways an image looks while training, where they are fixed."""
    return 1 if settings.augment.is_deterministic else settings.augment.views or 1


def plan_outputs(settings: DistillRecipe, layout: Layout, images: int, folder: Path) -> tuple[bool, str]:
    """Whether the teachers' outputs of the training images are computed once, and why or why not.

    Args:
        settings: the recipe.
        layout: of what the teachers say of an image.
        images: of the train domain.
        folder: where the file would lie; it exists.
    """
    views = num_views(settings)
    if settings.cache == "off":
        return False, "on every batch (cache=off)"
    if not settings.augment.is_deterministic and settings.augment.views is None:
        return False, "on every batch (augmentation changes the images; augment.views=V fixes V views)"
    if settings.epochs <= views:
        return False, f"on every batch (each of {views} views is read once: a file would not pay)"
    needed = cache_bytes((layout.width,), images, views, settings.cache_dtype)
    free = shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        warn(f"the teachers' outputs would take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        return False, "on every batch (no room for a file)"
    return True, f"once, {needed / 1e6:,.1f} MB in {folder}"


def load_outputs(
    teachers: Sequence[Teacher],
    layout: Layout,
    settings: DistillRecipe,
    domain: Domain,
    how: Preprocessing,
    numerics: Numerics,
    team: Team,
    folder: Path,
    *,
    training: bool,
    seed: int,
    workers: int,
    stop: StopFlag,
) -> FeatureCache:
    """The teachers' outputs of a domain, from an earlier start or computed now by all processes together.

    Args:
        teachers, layout, settings: what is computed; the teachers on the device.
        domain, how: the student's pixels.
        numerics: what is computed in.
        team: the processes.
        folder: where the file lies; it is another one where anything differs that the outputs depend on.
        training: the fixed augmented views, where they are asked for; else the view of evaluation.
        seed: of augmentation.
        workers: decoding processes.
        stop: whether this process was asked to stop.

    Raises:
        ModelError: an output is not finite.
        Preempted: a process was asked to stop; nothing half-made stays.
    """
    varies = training and not settings.augment.is_deterministic
    key = CacheKey(
        prefix=identity_of(teachers, layout),
        data=domain.fingerprint,
        preprocessing=how.to_dict(),
        views=num_views(settings) if varies else 1,
        augmentation=settings.augment.model_dump(mode="json") if varies else None,
        seed=seed if varies else 0,
        numerics=numerics.precision,
        dtype=settings.cache_dtype,
    )

    def is_there() -> bool:
        remove_leftovers(folder)  # of a start that was killed
        return open_cache(folder, key) is not None

    found = open_cache(folder, key) if team.on_main(is_there) else None
    if found is not None:
        return found
    answer = answering(teachers, layout, numerics)
    return fill_cache(
        folder,
        key,
        lambda images: _storable(answer(images), settings.cache_dtype),
        (layout.width,),
        domain,
        how,
        team,
        augmentation=Augmentation.of(settings.augment) if varies else None,
        workers=workers,
        label="the teachers' outputs",
        stop=stop,
    )


def _storable(outputs: Tensor, dtype: str) -> Tensor:
    """`ModelError` where an output is not a number that can be kept."""
    largest = float(outputs.abs().max())
    if not np.isfinite(largest):
        raise ModelError("the teachers' outputs are not finite (NaN or infinity): the weights are broken.")
    if dtype == "fp16" and largest > _HALF_MAX:
        raise ModelError(f"a teacher's output of {largest:.3g} is too large for cache_dtype=fp16; use fp32.")
    return outputs


def from_file(cache: FeatureCache, labels: np.ndarray) -> Teach:
    """Teach from outputs that were computed once.

    Args:
        cache: of the domain that the batches come from.
        labels: int64 (N,), of the same; -1 where there is none.
    """

    def teach(batch: Batch) -> Batch:
        indices = batch.indices.numpy()
        outputs = cache.read(batch.step.epoch if batch.step else 0, indices)
        if cache.broken:  # an image that could not be read then: there is nothing to teach of it
            known = {index for index, _ in batch.broken}
            new = [(i, cache.broken[i]) for i in indices.tolist() if i in cache.broken and i not in known]
            valid = batch.valid & torch.from_numpy(cache.valid[indices])
            batch = replace(batch, broken=batch.broken + new, valid=valid)
        return replace(batch, labels=_rows(labels[indices], outputs))

    return teach


def from_teachers(answer: Callable[[Tensor], Tensor], labels: np.ndarray, device: torch.device) -> Teach:
    """Teach by asking the teachers what they see in these very pixels.

    The loop counts that as waiting for data.

    Args:
        answer: of `answering`.
        labels: int64 (N,), of the domain that the batches come from; -1 where there is none.
        device: where teachers and student compute.
    """

    def teach(batch: Batch) -> Batch:
        images = batch.images.to(device, non_blocking=True)
        rows = _rows(labels[batch.indices.numpy()], answer(images))
        return replace(batch, images=images, labels=rows)

    return teach


def _rows(labels: np.ndarray, outputs: Tensor) -> Tensor:
    column = torch.from_numpy(labels).to(outputs.device, torch.float32)
    return torch.cat([column[:, None], outputs], 1)


def feature_moments(
    answer: Callable[[Tensor], Tensor],
    layout: Layout,
    domain: Domain,
    how: Preprocessing,
    team: Team,
    *,
    workers: int,
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the teachers' features, of images spread over the domain.

    Sums in float64 over all processes: the same for any number of them but for rounding.

    Returns:
        float32 (D,) each, on the device.
    """
    count = min(len(domain), MOST_FOR_MOMENTS)
    some = domain.subset(np.linspace(0, len(domain) - 1, count).astype(np.int64))
    width = sum(layout.features)
    sums = torch.zeros(2, width + 1, dtype=torch.float64, device=team.device)
    for batch in load_batches(some, blocks_of(count, 64, team.rank, team.size), how, workers=workers):
        outputs = answer(batch.images.to(team.device))[batch.valid.to(team.device)]
        features = outputs[:, outputs.shape[1] - width :].double()
        sums[0, :width] += features.sum(0)
        sums[1, :width] += features.square().sum(0)
        sums[:, width] += len(features)
    team.sum(sums)
    images = sums[0, width].clamp(min=1)
    mean = sums[0, :width] / images
    variance = (sums[1, :width] / images - mean.square()).clamp(min=0)
    return mean.float(), (variance + 1e-5).sqrt().float()
