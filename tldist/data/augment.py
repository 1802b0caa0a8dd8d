"""Augmentation of one sample, derived from (seed, epoch, sample): nothing random is ever saved."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
from torchvision.transforms import v2

from tldist.data.order import seed_of
from tldist.data.recipe import ViewRecipe
from tldist.runtime.decode import Size, decode_rgb, open_image, upright_size
from tldist.runtime.preprocess import OVERSAMPLE, Preprocessing, prepare, resize_box


@dataclass(frozen=True)
class Augmentation:
    """What is done to a training image.

    Attributes:
        crop: least and greatest share of the area of the random part; None: the centre crop of evaluation.
        ratio: least and greatest width-to-height ratio of that part.
        flip: mirror half of the images.
        brightness: greatest relative change of the grey values.
        policy: random operations on each image: none, randaugment or trivialaugment.
    """

    crop: tuple[float, float] | None = (0.35, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True
    brightness: float = 0.0
    policy: str = "none"

    @classmethod
    def of(cls, recipe: ViewRecipe) -> Augmentation:
        """As the settings say."""
        return cls(**{field.name: getattr(recipe, field.name) for field in fields(cls)})


def augment(
    data: bytes, how: Preprocessing, what: Augmentation, seed: int, epoch: int, sample: int
) -> np.ndarray:
    """Decode and augment one image.

    Args:
        data: bytes of the image file.
        how: the model's preprocessing (size, interpolation).
        what: the augmentation.
        seed, epoch, sample: all that the result depends on besides.

    Returns:
        uint8 (H, W, 3).

    Raises:
        BadImage: it cannot be decoded.
    """
    random = np.random.Generator(np.random.PCG64(seed_of("augment", seed, epoch, sample)))
    if what.crop is None:
        picture = prepare(data, how)
    else:
        image = open_image(data)
        box = random_box(upright_size(image), what.crop, what.ratio, random)
        picture = _cropped(image, box, how)
    if what.flip and random.random() < 0.5:
        picture = np.ascontiguousarray(picture[:, ::-1])
    if what.policy != "none":
        picture = _apply_policy(picture, what.policy, int(random.integers(2**62)))
    if what.brightness:
        factor = 1 + what.brightness * random.uniform(-1, 1)
        picture = np.clip(picture.astype(np.float32) * factor, 0, 255).round().astype(np.uint8)
    return picture


def _apply_policy(picture: np.ndarray, policy: str, seed: int) -> np.ndarray:
    """torchvision's RandAugment or TrivialAugmentWide on uint8 (H, W, 3), with randomness of its own."""
    operation = v2.RandAugment() if policy == "randaugment" else v2.TrivialAugmentWide()
    with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
        torch.manual_seed(seed)
        changed = operation(torch.from_numpy(picture).permute(2, 0, 1))
    return np.ascontiguousarray(changed.permute(1, 2, 0).numpy())


def random_box(
    size: Size, area: tuple[float, float], ratio: tuple[float, float], random: np.random.Generator
) -> tuple[int, int, int, int]:
    """A random part of an image (Inception's crop, arXiv:1409.4842, section 6): left, top, width, height."""
    width, height = size
    for _ in range(10):
        pixels = width * height * random.uniform(*area)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(0, width - w + 1)), int(random.integers(0, height - h + 1)), w, h
    side_w = min(width, max(1, round(height * ratio[1])))
    side_h = min(height, max(1, round(width / ratio[0])))
    return (width - side_w) // 2, (height - side_h) // 2, side_w, side_h


def _cropped(image, box: tuple[int, int, int, int], how: Preprocessing) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Decode no larger than the part needs, then resize the part."""
    width, height = upright_size(image)
    left, top, w, h = box
    need = OVERSAMPLE * max(how.width / w, how.height / h)
    picture = decode_rgb(image, at_least=(math.ceil(width * min(need, 1)), math.ceil(height * min(need, 1))))
    across, down = picture.width / width, picture.height / height
    part = (left * across, top * down, (left + w) * across, (top + h) * down)
    return resize_box(picture, part, how)
