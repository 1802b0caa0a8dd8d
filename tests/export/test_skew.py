"""No skew: from the bytes of any image file to probabilities, training, serving and torchvision agree."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.io import ImageReadMode, decode_image
from torchvision.models import squeezenet1_1
from torchvision.transforms import v2

from tests.support_export import CLASSES, SMALL
from tldist import api
from tldist.data.loader import load_batches
from tldist.domain import DataRecipe, open_domain
from tldist.export.samples import gather_samples
from tldist.export.skew import find_skew, training_images
from tldist.models.load import input_tensor, load_bundle
from tldist.runtime.package import Package
from tldist.runtime.predict import predict

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def smooth(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A picture that survives JPEG: uint8 (H, W, channels)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[:, :, c]).resize((width, height), Image.Resampling.BICUBIC)
        for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=2)


def encode(image: Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def turned(fmt: str, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(Image.fromarray(smooth(71, 50)), fmt, exif=exif)


@dataclass(frozen=True)
class File:
    """An image file, and the upright RGB picture that it shows by somebody else's account."""

    name: str
    data: bytes
    shows: np.ndarray


def by_torchvision(data: bytes) -> np.ndarray:
    """libjpeg and libpng as torchvision calls them: its own orientation, palette and CMYK."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    picture = decode_image(encoded, ImageReadMode.RGB, apply_exif_orientation=True)
    return picture.permute(1, 2, 0).numpy()


def on_white(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours (H, W, C) seen through alpha (H, W, 1) of 255, on white."""
    shown = colours * (alpha / 255) + 255 * (1 - alpha / 255)
    return np.broadcast_to(shown.round().astype(np.uint8), (*shown.shape[:2], 3))


def files() -> list[File]:
    """Every kind of file that is easy to treat in two ways."""
    odd, grey = smooth(77, 53), smooth(61, 47, 1)
    rgba, la = smooth(59, 48, 4), smooth(50, 49, 2)
    deep = np.linspace(0, 65535, 52 * 47).astype(np.uint16).reshape(47, 52)
    palette = Image.fromarray(odd).quantize(32)
    clear = Image.fromarray(np.arange(50 * 51, dtype=np.uint8).reshape(50, 51) // 64)
    clear.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 255, 90, 250, 90])
    shades = np.array([[10, 20, 30], [200, 100, 50], [0, 0, 255], [90, 250, 90]])
    alphas = np.array([255, 0, 128, 255])
    index = np.asarray(clear)
    cmyk = encode(Image.fromarray(odd).convert("CMYK"), "JPEG", quality=95)
    jpegs = {
        "odd.jpg": encode(Image.fromarray(odd), "JPEG", quality=92),
        "grey.jpg": encode(Image.fromarray(grey[:, :, 0]), "JPEG", quality=92),
        "cmyk.jpg": cmyk,
        "large.jpg": encode(Image.fromarray(smooth(150, 91)), "JPEG", quality=95),
        **{f"turned-{turn}.jpg": turned("JPEG", turn) for turn in range(1, 9)},
        **{f"turned-{turn}.png": turned("PNG", turn) for turn in range(1, 9)},
    }
    return [
        *(File(name, data, by_torchvision(data)) for name, data in jpegs.items()),
        File("odd.png", encode(Image.fromarray(odd), "PNG"), odd),
        File("grey.png", encode(Image.fromarray(grey[:, :, 0]), "PNG"), np.repeat(grey, 3, axis=2)),
        File(
            "grey16.png", encode(Image.fromarray(deep), "PNG"), np.stack([deep >> 8] * 3, 2).astype(np.uint8)
        ),
        File("palette.png", encode(palette, "PNG"), by_torchvision(encode(palette, "PNG"))),
        File("rgba.png", encode(Image.fromarray(rgba), "PNG"), on_white(rgba[:, :, :3], rgba[:, :, 3:])),
        File("la.png", encode(Image.fromarray(la, "LA"), "PNG"), on_white(la[:, :, :1], la[:, :, 1:])),
        File(
            "clear.png",
            encode(clear, "PNG", transparency=bytes(alphas.astype(np.uint8))),
            on_white(shades[index], alphas[index][:, :, None]),
        ),
        File("tall.png", encode(Image.fromarray(smooth(1, 90)), "PNG"), smooth(1, 90)),
        File("wide.png", encode(Image.fromarray(smooth(90, 1)), "PNG"), smooth(90, 1)),
        File("dot.png", encode(Image.fromarray(smooth(1, 1)), "PNG"), smooth(1, 1)),
        *(File(f"turned-{t}.tif", turned("TIFF", t), by_torchvision(turned("PNG", t))) for t in (1, 3, 6, 8)),
    ]


FILES = {file.name: file for file in files()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "all"
    folder.mkdir()
    for file in FILES.values():
        (folder / file.name).write_bytes(file.data)
    return folder.parent


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    values: np.ndarray = powers / powers.sum(1, keepdims=True)
    return values


@pytest.fixture(scope="module")
def by_training(exported: tuple[Path, Path], folder: Path) -> dict[str, np.ndarray]:
    """Probabilities (K,) of each file as evaluation computes them: loader, normalisation, PyTorch."""
    model = load_bundle(exported[0])[0]
    domain = open_domain(str(folder))
    found = {}
    for batch in load_batches(domain, np.array_split(np.arange(len(domain)), 4), SMALL, workers=2):
        assert batch.valid.all()
        with torch.no_grad():
            logits = model(input_tensor(batch.images, SMALL)).double().numpy()
        names = [Path(domain.id(index)).name for index in batch.indices.tolist()]
        found |= dict(zip(names, softmax(logits)))
    return found


@pytest.fixture(scope="module")
def by_others(exported: tuple[Path, Path]) -> dict[str, np.ndarray]:
    """Probabilities (K,) of each file by torchvision's transforms and network in float64."""
    fit = v2.Compose(
        [v2.Resize(SMALL.resize, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(SMALL.height)]
    )
    model = squeezenet1_1(num_classes=len(CLASSES)).double().eval()
    model.load_state_dict(load_file(exported[0] / "model.safetensors"))
    images = np.stack([np.asarray(fit(Image.fromarray(file.shows))) for file in FILES.values()])
    scaled = torch.from_numpy(((images / 255 - MEAN) / STD).transpose(0, 3, 1, 2))
    with torch.no_grad():
        return dict(zip(FILES, softmax(model(scaled).numpy())))


def served(package: Package, sources: list[Path | bytes]) -> list[np.ndarray]:
    order = {name: place for place, name in enumerate(package.config.classes)}
    rows = []
    for found in predict(package, sources, batch_size=7, top=len(CLASSES)):
        row = np.zeros(len(CLASSES))
        for name, probability in found.top:
            row[order[name]] = probability
        rows.append(row)
    return rows


NEAR = {"large.jpg": 2e-2, "rgba.png": 1e-3, "la.png": 1e-3, "clear.png": 1e-3}
"""Where the account of others is not of the same pixels: a large JPEG is decoded at half its size; alpha is
rounded in another order."""


@pytest.mark.parametrize("kind", ["paths", "bytes"])
def test_skew__training_serving_and_torchvision_agree_on_every_file(
    exported: tuple[Path, Path],
    folder: Path,
    by_training: dict[str, np.ndarray],
    by_others: dict[str, np.ndarray],
    kind: str,
) -> None:
    package = Package.open(exported[1], threads=1)
    sources = [folder / "all" / name if kind == "paths" else file.data for name, file in FILES.items()]
    assert by_training.keys() == FILES.keys()
    spread = np.ptp(np.stack(list(by_others.values())), axis=0).max()
    assert spread > 0.02  # the model tells these pictures apart
    for name, row in zip(FILES, served(package, sources)):
        np.testing.assert_allclose(row, by_training[name], rtol=0, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(row, by_others[name], rtol=0, atol=NEAR.get(name, 1e-6), err_msg=name)


def test_skew__parity_reads_files_by_both_pipelines(exported: tuple[Path, Path], folder: Path) -> None:
    (folder / "all" / "broken.png").write_bytes(b"no image")
    outcome = api.parity(models=tuple(map(str, exported)), data={"path": str(folder)})
    assert outcome.passed
    assert outcome.values["files_compared"] == len(FILES)
    assert f"{len(FILES)} files were read from their bytes on by training and by serving" in outcome.text


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda images: images.update(a=images["a"] + np.uint8(1)), "a: training and serving make other"),
        (lambda images: images.pop("b"), "b: only training can decode it"),
        (lambda images: images.update(z=images["a"]), "z: only serving can decode it"),
    ],
)
def test_find_skew__names_the_file(
    folder: Path, harm: Callable[[dict[str, np.ndarray]], object], words: str
) -> None:
    data = DataRecipe(path=str(folder))
    samples = gather_samples(data, 64, SMALL)
    images = dict(zip(samples.ids, samples.images[: dict(samples.groups)["real"]]))
    assert find_skew(data, 64, SMALL, images) == (len(FILES), [])
    first, second = sorted(images)[:2]
    words = words.replace("a:", f"{first}:").replace("b:", f"{second}:")
    short = {"a": images.pop(first), "b": images.pop(second)}
    harm(short)
    names = {"a": first, "b": second}
    images |= {names.get(name, name): image for name, image in short.items()}
    problems = find_skew(data, 64, SMALL, images)[1]
    assert len(problems) == 1
    assert words in problems[0]


def test_training_images__are_those_of_the_loader_and_broken_ones_are_left_out(folder: Path) -> None:
    found = training_images(open_domain(str(folder)), SMALL)
    assert len(found) == len(FILES)
    assert all(image.shape == (40, 40, 3) and image.dtype == np.uint8 for image in found.values())
