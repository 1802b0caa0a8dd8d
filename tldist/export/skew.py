"""Whether training and serving make the same pixels of an image file. Needs torch: it runs the loader."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from tldist.data.loader import load_batches
from tldist.domain import DataRecipe, Domain
from tldist.export.samples import chosen_images
from tldist.runtime.preprocess import Preprocessing

_BATCH = 32
_SHOWN = 5


def training_images(domain: Domain, how: Preprocessing) -> dict[str, np.ndarray]:
    """What the model is given when it is evaluated in training: uint8 (H, W, 3) of each image that can be
    decoded, by id."""
    plans = np.array_split(np.arange(len(domain)), -(-len(domain) // _BATCH))
    return {
        domain.id(index): image
        for batch in load_batches(domain, plans, how)
        for index, image, valid in zip(batch.indices.tolist(), batch.images.numpy(), batch.valid.tolist())
        if valid
    }


def find_skew(
    data: DataRecipe, count: int, how: Preprocessing, served: Mapping[str, np.ndarray], most: float = 0
) -> tuple[int, list[str]]:
    """How many files went through both pipelines, and what differs.

    Args:
        data: the domain whose files are read.
        count: how many of them.
        how: the preprocessing.
        served: what serving makes of them: uint8 (H, W, 3), by id.
        most: grey levels that a file's pixels may differ by in the mean; 0: not a single one may differ.
    """
    trained = training_images(chosen_images(data, count), how)
    problems = [*_differences(trained, served, most)]
    more = [f"{len(problems) - _SHOWN} more files differ between training and serving."]
    return len(trained.keys() & served.keys()), problems[:_SHOWN] + more * (len(problems) > _SHOWN)


def _differences(
    trained: Mapping[str, np.ndarray], served: Mapping[str, np.ndarray], most: float
) -> Iterator[str]:
    for name in sorted(trained.keys() ^ served.keys()):
        yield f"{name}: only {'training' if name in trained else 'serving'} can decode it."
    for name in sorted(trained.keys() & served.keys()):
        gap = np.abs(trained[name].astype(np.int16) - served[name])
        if gap.mean() > most:
            yield (
                f"{name}: training and serving make other pixels of it, by up to {gap.max()} grey levels, "
                f"{gap.mean():.2f} in the mean."
            )
