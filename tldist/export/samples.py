"""The images that parity is measured on: real ones, or generated ones like them, and extremes."""

from __future__ import annotations

import numpy as np
from PIL import Image

from tldist.domain import DataRecipe, open_domain
from tldist.errors import DomainError
from tldist.progress import warn
from tldist.runtime.decode import BadImage
from tldist.runtime.preprocess import Preprocessing, prepare
from tldist.runtime.reference import Samples

NUM_NOISE = 5
"""With one all-black, one all-white and one real image they fill a batch of 7, with one over."""


def gather_samples(data: DataRecipe | None, count: int, how: Preprocessing) -> Samples:
    """Images to compare on: ``count`` real or generated ones, then black, white and noise.

    Raises:
        DomainError: the domain cannot be opened, or none of its images can be decoded.
    """
    if data is None:
        images = natural_images(count, how.height, how.width)
        name, ids = "generated", tuple(f"generated-{number}" for number in range(count))
    else:
        name = "real"
        images, ids = real_images(data, count, how)
    extremes = extreme_images(how.height, how.width)
    groups = ((name, len(images)), *((group, len(part)) for group, part in extremes.items()))
    more = tuple(f"{group}-{number}" for group, part in extremes.items() for number in range(len(part)))
    return Samples(np.concatenate([images, *extremes.values()]), groups, ids + more)


def real_images(data: DataRecipe, count: int, how: Preprocessing) -> tuple[np.ndarray, tuple[str, ...]]:
    """At most ``count`` images of a domain, spread over its classes: uint8 (N, H, W, 3), and their ids."""
    domain = open_domain(data)
    domain = domain if data.split else domain.evaluation_split()
    images, ids = [], []
    for index in range(len(chosen := domain.limited(count))):
        try:
            images.append(prepare(chosen.read(index), how))
            ids.append(chosen.id(index))
        except BadImage as reason:
            warn(f"{chosen.id(index)}: {reason}; left out of the comparison.")
    if not images:
        raise DomainError(f"{domain.name}: no image of it can be decoded to compare on.")
    return np.stack(images), tuple(ids)


def natural_images(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Random pictures with the spectrum of photographs: amplitude falls with frequency, colours go together.

    Returns:
        uint8 (count, height, width, 3).
    """
    random = np.random.default_rng(seed)
    return np.stack([_natural_image(random, height, width) for _ in range(count)])


def _natural_image(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    picture = np.zeros((height, width, 3))
    cells = 2
    while cells <= max(height, width):
        coarse = random.normal(size=(cells, cells, 1)) + 0.4 * random.normal(size=(cells, cells, 3))
        layers = [
            np.asarray(Image.fromarray(coarse[:, :, c].astype(np.float32)).resize((width, height)))
            for c in range(3)
        ]
        picture += np.stack(layers, axis=2) / cells  # each octave at half the amplitude: 1/f
        cells *= 2
    spread = random.uniform(25, 70) / picture.std()
    values = (picture - picture.mean()) * spread + random.uniform(70, 180)
    return np.clip(values, 0, 255).astype(np.uint8)


def extreme_images(height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """All 0, all 255 and uniform noise, by name: uint8 (N, height, width, 3)."""
    shape = (height, width, 3)
    noise = np.random.default_rng(seed).integers(0, 256, (NUM_NOISE, *shape), dtype=np.uint8)
    return {
        "black": np.zeros((1, *shape), np.uint8),
        "white": np.full((1, *shape), 255, np.uint8),
        "noise": noise,
    }
