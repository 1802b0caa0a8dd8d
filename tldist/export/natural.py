"""Images that nobody took: pictures with the spectrum of photographs, and extremes."""

from __future__ import annotations

import numpy as np
from PIL import Image

NUM_NOISE = 5
"""With one all-black, one all-white and one real image they fill a batch of 7, with one over."""


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
