"""Decoding: every kind of image file becomes the upright RGB picture that a person sees."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tldist.runtime.decode import BadImage, decode_rgb, open_image, read_bytes, upright_size

SIZES = [(1, 1), (7, 3), (40, 36), (33, 65)]


def smooth(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture that survives JPEG: uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(open_image(data)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fmt", ["PNG", "BMP", "TIFF", "PPM"])
def test_decode__lossless_formats_are_exact(size: tuple[int, int], fmt: str) -> None:
    picture = smooth(*size)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(picture), fmt)), picture)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_decode__jpeg_as_pillow_does(options: dict[str, object]) -> None:
    data = encode(Image.fromarray(smooth(65, 33)), "JPEG", **options)
    np.testing.assert_array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF"])
def test_decode__grey_is_three_equal_channels(fmt: str) -> None:
    grey = Image.fromarray(smooth(40, 30)).convert("L")
    found = decode(encode(grey, fmt))
    assert (found == found[:, :, :1]).all()
    assert np.abs(found[:, :, 0].astype(int) - np.asarray(grey)).max() <= (6 if fmt == "JPEG" else 0)


def test_decode__one_bit() -> None:
    bits = np.random.default_rng(0).integers(0, 2, (9, 13)).astype(bool)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(bits), "PNG"))[:, :, 1], bits * 255)


def test_decode__cmyk_jpeg_shows_its_colours() -> None:
    picture = smooth(48, 40)
    data = encode(Image.fromarray(picture).convert("CMYK"), "JPEG", quality=98)
    assert open_image(data).mode == "CMYK"
    assert np.abs(decode(data).astype(int) - picture).mean() < 4


def test_decode__palette_is_looked_up() -> None:
    palette = Image.fromarray(smooth(40, 30)).quantize(16)
    np.testing.assert_array_equal(decode(encode(palette, "PNG")), np.asarray(palette.convert("RGB")))
    np.testing.assert_array_equal(decode(encode(palette, "GIF")), np.asarray(palette.convert("RGB")))


def test_decode__transparent_palette_entry_shows_white() -> None:
    indices = np.array([[0, 1], [1, 2]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255])
    found = decode(encode(image, "PNG", transparency=1))
    np.testing.assert_array_equal(found, [[[10, 20, 30], [255] * 3], [[255] * 3, [0, 0, 255]]])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_decode__alpha_is_laid_on_white(mode: str) -> None:
    random = np.random.default_rng(0)
    channels = 4 if mode == "RGBA" else 2
    picture = random.integers(0, 256, (20, 30, channels), dtype=np.uint8)
    found = decode(encode(Image.fromarray(picture, mode), "PNG")).astype(float)
    alpha = picture[:, :, -1:] / 255
    expected = picture[:, :, :-1] * alpha + 255 * (1 - alpha)
    assert np.abs(found - np.broadcast_to(expected, found.shape)).max() <= 1


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_decode__sixteen_bits_keep_the_upper_byte(fmt: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (12, 17), dtype=np.uint16)
    np.testing.assert_array_equal(decode(encode(Image.fromarray(deep), fmt))[:, :, 2], deep >> 8)


TURNS = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: p.transpose(1, 0, 2)[:, ::-1],
    7: lambda p: p.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda p: p.transpose(1, 0, 2)[::-1],
}
"""What each EXIF orientation asks for (TIFF 6.0, tag 274), from stored rows and columns to upright ones."""


@pytest.mark.parametrize("orientation", sorted(TURNS))
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_decode__exif_orientation_is_applied(orientation: int, fmt: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if fmt == "WEBP" else {}
    picture = smooth(64, 40)
    data = encode(Image.fromarray(picture), fmt, exif=exif, **options)
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if fmt == "JPEG" else picture
    found = decode(data)
    np.testing.assert_array_equal(found, TURNS[orientation](stored))
    assert upright_size(open_image(data)) == (found.shape[1], found.shape[0])


@pytest.mark.parametrize("orientation", sorted(TURNS))
@pytest.mark.parametrize("mode", ["RGB", "L", "F"])
def test_decode__exif_orientation_of_tiff(orientation: int, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(smooth(64, 40)).convert(mode)
    data = encode(picture, "TIFF", exif=exif)
    found = decode(data)
    np.testing.assert_array_equal(found, TURNS[orientation](np.asarray(picture.convert("RGB"))))
    assert upright_size(open_image(data)) == (found.shape[1], found.shape[0])


def png(pixels: np.ndarray, colour: int, clear: tuple[int, ...] = ()) -> bytes:
    """A 16-bit PNG by the specification: uint16 (H, W, channels) of a colour type, perhaps with tRNS."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if clear:
        chunks.insert(1, (b"tRNS", struct.pack(f">{len(clear)}H", *clear)))
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_decode__one_transparent_colour_of_16_bits_shows_white(colour: int, channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (6, 9, channels), dtype=np.uint16)
    clear = tuple(deep[2, 3].tolist())
    expected = np.broadcast_to(deep >> 8, (6, 9, 3)).copy()
    np.testing.assert_array_equal(decode(png(deep, colour)), expected)
    expected[2, 3] = 255
    np.testing.assert_array_equal(decode(png(deep, colour, clear)), expected)


def test_decode__one_transparent_colour_shows_white() -> None:
    picture = smooth(12, 9).copy()
    picture[4, 5] = (9, 8, 7)
    found = decode(encode(Image.fromarray(picture), "PNG", transparency=(9, 8, 7)))
    picture[4, 5] = 255
    np.testing.assert_array_equal(found, picture)


@pytest.mark.parametrize(("colour", "channels"), [(4, 2), (6, 4)])
def test_decode__alpha_of_16_bits_is_laid_on_white(colour: int, channels: int) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (6, 9, channels), dtype=np.uint16)
    alpha = deep[:, :, -1:] / 65535
    expected = np.broadcast_to(deep[:, :, :-1] / 257 * alpha + 255 * (1 - alpha), (6, 9, 3))
    assert np.abs(decode(png(deep, colour)) - expected).max() < 2


def test_decode__draft_covers_what_was_asked_for() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(smooth(800, 400)), "JPEG", exif=exif)
    small = decode_rgb(open_image(data), at_least=(90, 180))
    assert small.size == (100, 200)
    whole = decode_rgb(open_image(data)).resize(small.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(small).astype(int) - np.asarray(whole)).mean() < 1.5


@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_decode__truncated_is_a_bad_image(fmt: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), fmt)
    with pytest.raises(BadImage):
        decode(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff\xe0", b"hello" * 100])
def test_decode__rubbish_is_a_bad_image(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode(data)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_decode__flipped_bytes_decode_or_are_bad() -> None:
    random = np.random.default_rng(0)
    for fmt in ("PNG", "JPEG", "TIFF", "WEBP", "GIF"):
        clean = bytearray(encode(Image.fromarray(smooth(40, 40)), fmt))
        for _ in range(60):
            data = bytearray(clean)
            for place in random.integers(0, len(data), 3):
                data[place] = random.integers(0, 256)
            with contextlib.suppress(BadImage):
                assert decode(bytes(data)).shape[2] == 3


def test_decode__bomb_is_refused_by_its_header() -> None:
    header = bytearray(encode(Image.new("1", (1, 1)), "BMP"))
    header[18:26] = (30000).to_bytes(4, "little") * 2
    with pytest.raises(BadImage, match=r"larger|exceeds"):
        open_image(bytes(header))


def test_read_bytes__missing_file_is_a_bad_image(tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="No such file"):
        read_bytes(tmp_path / "none.png")
