"""From a decoded image to the model's input: the one preprocessing of training, evaluation and serving.

The model's input is uint8, (N, H, W, 3), RGB; normalisation ``(x / 255 - mean) / std`` is part of the model
(in the exported graph too), so what crosses a process border or a network is bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from tldist.runtime.decode import Size, decode_rgb, open_image, upright_size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
OVERSAMPLE = 2
"""A JPEG is decoded at no less than this multiple of the size it is resized to (mean error 0.2 of 255)."""

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input.

    Attributes:
        height, width: pixels of the model's input.
        resize: the shorter side in pixels before the centre crop.
        interpolation: filter of the resize, with antialiasing.
        mean, std: per RGB channel, in units of [0, 1].
    """

    height: int = 224
    width: int = 224
    resize: int = 256
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.resize) < 1:
            raise ValueError(f"sizes must be positive: {self.height}x{self.width}, resize {self.resize}")
        if self.interpolation not in _FILTERS:
            raise ValueError(f"interpolation '{self.interpolation}'; known: {', '.join(_FILTERS)}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError("mean and std have three values, std positive")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """From plain JSON data; unknown keys raise TypeError, impossible values ValueError."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def prepare(data: bytes, how: Preprocessing) -> np.ndarray:
    """Decode, resize the shorter side, crop the centre.

    Args:
        data: bytes of an image file.
        how: the preprocessing of the model.

    Returns:
        uint8 (H, W, 3), RGB.

    Raises:
        BadImage: it cannot be decoded.
    """
    return fit(*_open(data, how))


def prepare_picture(data: bytes, how: Preprocessing) -> np.ndarray:
    """Decode for a graph that resizes and crops by itself: the pixels that `prepare` would resize.

    Returns:
        uint8 (H, W, 3), RGB, of any size: a large JPEG is already reduced, as `OVERSAMPLE` says.

    Raises:
        BadImage: it cannot be decoded.
    """
    return np.array(_open(data, how)[0], dtype=np.uint8)


def _open(data: bytes, how: Preprocessing) -> tuple[Image.Image, Preprocessing, Size]:
    """The picture before it is resized, and the (width, height) that it will be resized to."""
    image = open_image(data)
    scaled = _scaled_size(upright_size(image), max(how.resize, how.height, how.width))
    return decode_rgb(image, at_least=(scaled[0] * OVERSAMPLE, scaled[1] * OVERSAMPLE)), how, scaled


def fit(picture: Image.Image, how: Preprocessing, scaled: Size | None = None) -> np.ndarray:
    """Resize an RGB image by its shorter side and crop its centre to uint8 (H, W, 3)."""
    width, height = scaled or _scaled_size(picture.size, max(how.resize, how.height, how.width))
    if picture.size != (width, height):
        picture = picture.resize((width, height), _FILTERS[how.interpolation])
    # Rounded as torchvision does (half to even): published weights see the pixels they were made with.
    left, top = round((width - how.width) / 2), round((height - how.height) / 2)
    picture = picture.crop((left, top, left + how.width, top + how.height))
    return np.array(picture, dtype=np.uint8)  # a copy: writable, and its own memory


def resize_box(
    picture: Image.Image, box: tuple[float, float, float, float], how: Preprocessing
) -> np.ndarray:
    """Resize the part ``box`` (left, top, right, bottom in pixels) to uint8 (H, W, 3), antialiased."""
    part = picture.resize((how.width, how.height), _FILTERS[how.interpolation], box=box)
    return np.array(part, dtype=np.uint8)


def _scaled_size(size: Size, shorter: int) -> Size:
    """(width, height) whose shorter side is ``shorter``, in the picture's proportions, as in torchvision."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


def normalize(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W): ``(x / 255 - mean) / std``."""
    scaled = images.astype(np.float32) / np.float32(255)
    normal = (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))
