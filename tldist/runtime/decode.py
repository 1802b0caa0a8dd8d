"""From the bytes of an image file to an upright 8-bit RGB picture: one decoder for training and serving."""

from __future__ import annotations

import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 200_000_000
"""Larger pictures are refused before they are decoded (a decompression bomb is bad input, not a crash)."""

Size = tuple[int, int]

_TURNED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


class BadImage(ValueError):
    """An image that cannot be decoded; the message says why in a few words."""


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Read an image file; what cannot be read is a `BadImage`."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from error


def open_image(data: bytes) -> Image.Image:
    """Parse the header only.

    Raises:
        BadImage: empty, not an image, or larger than `MAX_PIXELS`.
    """
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise BadImage("not an image that can be identified") from None
    except Exception as error:  # hostile headers raise nearly anything
        raise BadImage(f"broken header: {error}") from error
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels: larger than {MAX_PIXELS:,}")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. A PNG is decoded for it (its EXIF may come last), so it may be broken."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def upright_size(image: Image.Image) -> Size:
    """Width and height in pixels after the EXIF orientation is applied, without decoding."""
    # Pillow's TIFF plugin turns by itself: the size that it gives is upright before the pixels are.
    turned = image.format != "TIFF" and _orientation(image) in _TURNED
    return (image.height, image.width) if turned else (image.width, image.height)


def decode_rgb(image: Image.Image, at_least: Size | None = None) -> Image.Image:
    """Decode to upright 8-bit RGB.

    Args:
        image: an opened, not yet decoded image.
        at_least: (width, height) below which the result may not fall, upright. A JPEG is then decoded at
            1/2, 1/4 or 1/8 of its size where that still covers it (several times faster).

    Returns:
        An RGB image, possibly smaller than the file's by a whole factor.

    Raises:
        BadImage: truncated or corrupt pixel data.
    """
    try:
        orientation = _orientation(image)
        if at_least is not None and image.format == "JPEG":
            stored = at_least[::-1] if orientation in _TURNED else at_least
            image.draft("RGB" if image.mode in ("RGB", "YCbCr") else image.mode, stored)
        image.load()
        if orientation != 1:
            image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except BadImage:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage(f"cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        return _deep_grey(image)
    if image.mode == "F":
        return Image.fromarray(np.clip(np.asarray(image), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = _with_alpha(image)
    if image.mode in ("RGBA", "LA", "La", "RGBa"):
        # What shows through transparency is undefined; white is what viewers and print show.
        picture = image.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, picture).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """16-bit grey: Pillow clips it at 255, while its upper byte is the picture."""
    grey = np.asarray(image).astype(np.int64)
    levels = np.clip(grey >> 8, 0, 255).astype(np.uint8)
    if isinstance(clear := image.info.get("transparency"), int):
        levels[grey == clear] = 255
    return Image.fromarray(levels).convert("RGB")


def _with_alpha(image: Image.Image) -> Image.Image:
    """The palette's transparency, or that of one colour, as an alpha channel."""
    clear = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
        # A 16-bit PNG, of which Pillow keeps the upper bytes.
        image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image.convert("RGBA")
