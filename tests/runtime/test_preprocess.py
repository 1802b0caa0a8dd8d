"""Preprocessing: the same pixels as torchvision's, in training and serving alike."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tldist.data.loader import load_batches
from tldist.data.order import blocks_of
from tldist.domain import open_domain
from tldist.models.load import input_tensor
from tldist.runtime.decode import BadImage
from tldist.runtime.preprocess import Preprocessing, normalize, prepare

INTERPOLATION = {"bilinear": v2.InterpolationMode.BILINEAR, "bicubic": v2.InterpolationMode.BICUBIC}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 192), (30, 30), (60, 30), (16, 48), (256, 512)])
def test_prepare__is_torchvisions_resize_and_crop(size: tuple[int, int], interpolation: str) -> None:
    how = Preprocessing(24, 24, 32, interpolation)
    image = picture(*size)
    expected = v2.CenterCrop(24)(v2.Resize(32, INTERPOLATION[interpolation], antialias=True)(image))
    np.testing.assert_array_equal(prepare(encode(image), how), np.asarray(expected))


@pytest.mark.parametrize("size", [(65, 33), (41, 97), (301, 200), (1, 50), (50, 1), (3, 2), (1, 1), (99, 11)])
@pytest.mark.parametrize("crop", [(24, 20), (31, 32), (32, 32)])
def test_prepare__odd_sizes_are_rounded_as_torchvision_does(
    size: tuple[int, int], crop: tuple[int, int]
) -> None:
    image = picture(*size)
    expected = v2.CenterCrop(crop)(v2.Resize(32, antialias=True)(image))
    np.testing.assert_array_equal(prepare(encode(image), Preprocessing(*crop, 32)), np.asarray(expected))


@pytest.mark.parametrize(
    "how", [Preprocessing(24, 24, 16), Preprocessing(40, 20, 30), Preprocessing(7, 9, 8)]
)
def test_prepare__crop_larger_than_the_resize_never_pads(how: Preprocessing) -> None:
    image = Image.new("RGB", (50, 31), (200, 100, 50))
    assert (prepare(encode(image), how) == [200, 100, 50]).all()


def test_prepare__large_jpeg_is_near_the_full_decode() -> None:
    how = Preprocessing(96, 96, 110)
    image = picture(1500, 1000)
    data = encode(image, "JPEG", quality=92)
    full = v2.CenterCrop(96)(v2.Resize(110, antialias=True)(Image.open(io.BytesIO(data)).convert("RGB")))
    assert np.abs(prepare(data, how).astype(int) - np.asarray(full)).mean() < 1


def test_normalize__numpy_torch_and_torchvision_agree() -> None:
    how = Preprocessing(5, 6, 6, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.7))
    images = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    expected = (images.astype(np.float64) / 255 - how.mean) / how.std
    expected = expected.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(normalize(images, how.mean, how.std), expected, rtol=0, atol=2e-6)
    tensors = torch.from_numpy(images)
    np.testing.assert_allclose(input_tensor(tensors, how), expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(input_tensor(tensors, how, dtype=torch.float64), expected, rtol=0, atol=1e-14)
    scaled = tensors.permute(0, 3, 1, 2) / 255
    np.testing.assert_allclose(v2.functional.normalize(scaled, how.mean, how.std), expected, atol=2e-6)


def awkward_files(folder: Path) -> Path:
    """One image of each awkward kind."""
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    base = picture(67, 45)
    deep = (np.asarray(base.convert("L")).astype(np.uint16) << 8) + 7
    files = {
        "odd.png": encode(base),
        "grey.jpg": encode(base.convert("L"), "JPEG"),
        "cmyk.jpg": encode(base.convert("CMYK"), "JPEG"),
        "palette.gif": encode(base.quantize(20), "GIF"),
        "alpha.png": encode(Image.merge("RGBA", (*base.split(), base.convert("L")))),
        "turned.jpg": encode(picture(400, 301), "JPEG", exif=exif),
        "deep.png": encode(Image.fromarray(deep)),
        "large.jpg": encode(picture(900, 700), "JPEG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def test_loader__training_and_serving_see_the_same_pixels(tmp_path: Path) -> None:
    folder = awkward_files(tmp_path / "d" / "a")
    domain = open_domain(tmp_path / "d")
    how = Preprocessing(32, 28, 40, "bicubic")
    seen = 0
    for batch in load_batches(domain, blocks_of(len(domain), 3, 0, 1), how):
        assert bool(batch.valid.all()), batch.broken
        for image, index in zip(batch.images.numpy(), batch.indices.tolist()):
            data = (folder.parent / domain.id(index)).read_bytes()
            np.testing.assert_array_equal(image, prepare(data, how))
            seen += 1
    assert seen == len(domain) == 8


def test_prepare__a_line_is_resized_and_one_that_would_fill_memory_is_refused() -> None:
    how = Preprocessing(24, 24, 32)
    assert prepare(encode(picture(1, 40)), how).shape == (24, 24, 3)
    assert prepare(encode(picture(40, 1)), how).shape == (24, 24, 3)
    for size in ((1, 200_000), (200_000, 1)):  # 32 x 6,400,000 pixels
        with pytest.raises(BadImage, match="too narrow"):
            prepare(encode(Image.new("L", size)), how)
