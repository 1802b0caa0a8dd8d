"""From the body of a request to the bytes of its images, within the limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass

import numpy as np
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from tldist.runtime.decode import BadImage, open_image
from tldist.runtime.package import PackageConfig
from tldist.runtime.preprocess import prepare, prepare_picture
from tldist.serve.recipe import ServeRecipe

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""Pillow's names of what is decoded. It knows some 40 more, which nobody sends but to do harm."""
_DISCARD_SECONDS = 1.0
_TYPES = "the image itself (image/*, application/octet-stream) or files in multipart/form-data"


class Refused(Exception):
    """A request that is answered with an error.

    Args:
        status: the HTTP status.
        reason: for the client.
        close: end the connection, as the body was not read.
    """

    def __init__(self, status: int, reason: str, *, close: bool = False) -> None:
        super().__init__(reason)
        self.status, self.reason, self.close = status, reason, close


@dataclass(frozen=True)
class Upload:
    """One image of a request.

    Attributes:
        name: its file name as the client gave it; None for a body that is the image.
        data: the bytes of the file.
    """

    name: str | None
    data: bytes


class _Parser(MultiPartParser):
    """Keeps files in memory (the body is limited, and a container's disk may be read-only), and knows
    whether the closing boundary came."""

    spool_max_size = 1 << 40
    ended = False

    def on_end(self) -> None:
        self.ended = True


async def read_uploads(request: Request, recipe: ServeRecipe) -> list[Upload]:
    """Read the images of a request.

    Raises:
        Refused: 400 malformed or empty, 413 too large, 415 of another type.
        ClientDisconnect: the client has gone.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise Refused(415, "the body must not be compressed: images are already", close=True)
    if kind == "multipart/form-data":
        return await _read_files(request, recipe)
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise Refused(415, f"content type '{kind}': expected {_TYPES}", close=True)
    data = b"".join([chunk async for chunk in _limited(request, recipe.max_body_bytes)])
    if not data:
        raise Refused(400, f"empty body: expected {_TYPES}")
    return [Upload(None, data)]


async def _read_files(request: Request, recipe: ServeRecipe) -> list[Upload]:
    stream = _limited(request, recipe.max_body_bytes)
    parser = _Parser(request.headers, stream, max_files=recipe.max_images, max_fields=100)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise Refused(400, f"multipart/form-data: {error.message}", close=True) from error
    try:
        if not parser.ended:
            raise Refused(400, "multipart/form-data: the closing boundary is missing")
        files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
        if not files:
            raise Refused(400, "multipart/form-data: no file in it (a part with a filename)")
        return [Upload(file.filename or None, await file.read()) for file in files]
    finally:
        await form.close()


async def _limited(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes; `Refused` with 413 once it is larger than ``most`` bytes, or says it will be."""
    too_large = Refused(413, f"the body is larger than {most:,} bytes", close=True)
    declared, stream = request.headers.get("content-length", ""), request.stream()
    if declared.isdecimal() and int(declared) > most:
        if request.headers.get("expect", "").lower() != "100-continue":
            await _discard(stream, most)
        raise too_large
    size = 0
    async for chunk in stream:
        size += len(chunk)
        if size > most:
            await _discard(stream, most)
            raise too_large
        yield chunk


async def _discard(stream: AsyncGenerator[bytes, None], most: int) -> None:
    """Read on for a moment: a client that still sends when the connection closes would not see the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for chunk in stream:
                most -= len(chunk)
                if most < 0:
                    return


def decode(data: bytes, config: PackageConfig, max_pixels: int) -> np.ndarray:
    """The bytes of an image file to the model's input, uint8 (H, W, 3).

    Raises:
        BadImage: it cannot be decoded, is too large, or of a format that is not served.
    """
    image = open_image(data)
    if image.format not in FORMATS:
        raise BadImage(f"format {image.format}: not among {', '.join(FORMATS)}")
    if image.width * image.height > max_pixels:
        raise BadImage(f"{image.width}x{image.height} pixels: larger than {max_pixels:,}")
    # A graph with input=dynamic would take any size; it gets the one that it was trained with.
    whole = config.input == "picture"
    return (prepare_picture if whole else prepare)(data, config.preprocessing)
