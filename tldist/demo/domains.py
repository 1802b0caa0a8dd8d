"""The demo's domains on disk: printed digits in three styles (sources) and real handwritten ones (target)."""

from __future__ import annotations

import contextlib
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from sklearn.datasets import load_digits

DIGITS = tuple("0123456789")
SIDE = 32
"""Pixels of every image file."""
_ASCII, _MATH_SANS, _MATH_SANS_BOLD, _MATH_MONO = "0", "\U0001d7e2", "\U0001d7ec", "\U0001d7f6"
STYLES: dict[str, tuple[tuple[str, str], ...]] = {
    "sans": (
        ("DejaVuSans", _ASCII),
        ("DejaVuSans-Bold", _ASCII),
        ("DejaVuSansMono", _ASCII),
        ("DejaVuSansMono-Bold", _ASCII),
        ("STIXGeneral", _MATH_SANS),
        ("STIXGeneral", _MATH_SANS_BOLD),
        ("cmss10", _ASCII),
    ),
    "serif": (
        ("DejaVuSerif", _ASCII),
        ("DejaVuSerif-Bold", _ASCII),
        ("STIXGeneral", _ASCII),
        ("STIXGeneralBol", _ASCII),
        ("STIXGeneral", _MATH_MONO),
        ("cmr10", _ASCII),
        ("cmb10", _ASCII),
        ("cmtt10", _ASCII),
    ),
    "slanted": (
        ("DejaVuSans-Oblique", _ASCII),
        ("DejaVuSans-BoldOblique", _ASCII),
        ("DejaVuSansMono-Oblique", _ASCII),
        ("DejaVuSansMono-BoldOblique", _ASCII),
        ("DejaVuSerif-Italic", _ASCII),
        ("DejaVuSerif-BoldItalic", _ASCII),
        ("STIXGeneralItalic", _ASCII),
        ("STIXGeneralBolIta", _ASCII),
        ("cmti10", _ASCII),
    ),
}
"""The source domains: a style, and its faces (a font that matplotlib carries, the character of its zero)."""

_GRID = 8  # the resolution of scikit-learn's digits
_BITMAP = 32  # its digits are counts of ink in 4x4 cells of a 32x32 bitmap
_CANVAS = 128
_MESH = 4


def write_source(folder: Path, style: str, per_class: int, seed: int) -> Path:
    """Write a source domain: ``folder/{train,val}/DIGIT/NUMBER.png``; does nothing where it is there.

    Args:
        folder: where to.
        style: a key of `STYLES`.
        per_class: images of each digit; a fifth of them becomes the val split.
        seed: of all that is random.
    """
    if folder.is_dir():
        return folder
    faces = [(ImageFont.truetype(str(find_font(name)), 96), zero) for name, zero in STYLES[style]]
    random = np.random.default_rng([seed, zlib.crc32(style.encode())])
    with _whole_folder(folder) as making:
        for digit in DIGITS:
            for number in range(per_class):
                split = "val" if number < per_class // 5 else "train"
                font, zero = faces[int(random.integers(len(faces)))]
                character = chr(ord(zero) + int(digit))
                _save(making / split / digit / f"{number}.png", print_character(character, font, random))
    return folder


def write_pool(folder: Path, sources: Sequence[Path]) -> Path:
    """Write the union of source domains, its files named after the domain they come from."""
    if folder.is_dir():
        return folder
    with _whole_folder(folder) as making:
        for source in sources:
            for image in sorted(source.glob("*/*/*.png")):
                split, digit = image.parts[-3:-1]
                copy = making / split / digit / f"{source.name}-{image.name}"
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(image.read_bytes())
    return folder


def write_target(folder: Path, draw: int, labelled: int) -> Path:
    """Write the target domain: ``labelled`` random images of each digit in train/, all others in test/.

    The images are the 1,797 handwritten digits of `sklearn.datasets.load_digits`.

    Args:
        folder: where to.
        draw: which random choice of the labelled images.
        labelled: images of each digit to train on.
    """
    if folder.is_dir():
        return folder
    digits = load_digits()
    random = np.random.default_rng([draw, 2024])
    with _whole_folder(folder) as making:
        for digit in DIGITS:
            members = random.permutation(np.flatnonzero(digits.target == int(digit)))
            for place, index in enumerate(members.tolist()):
                split = "train" if place < labelled else "test"
                _save(making / split / digit / f"{index}.png", digits.images[index])
    return folder


def find_font(name: str) -> Path:
    """The file of a font, in matplotlib's own folder."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def print_character(character: str, font: ImageFont.FreeTypeFont, random: np.random.Generator) -> np.ndarray:
    """Print one digit as a person with a worn typewriter might, and scan it as the target was scanned.

    Random stroke thickness, rotation, slant and wrinkles; then the target's own acquisition: the ink fills a
    32x32 bitmap from top to bottom and is counted in 4x4 cells.

    Returns:
        float64 (8, 8): ink, 0 to 16.
    """
    image = Image.new("L", (_CANVAS, _CANVAS))
    stroke = int(random.integers(0, 5))
    ImageDraw.Draw(image).text(
        (_CANVAS / 2, _CANVAS / 2), character, fill=255, font=font, anchor="mm", stroke_width=stroke
    )
    image = _warp(image, random)
    return count_ink(image.crop(image.getbbox()), random)


def _warp(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Rotate and slant the whole, and pull at the nodes of a mesh: ink runs, paper wrinkles."""
    side = image.width
    cuts = np.linspace(0, side, _MESH + 1).round().astype(int)
    nodes = np.stack(np.meshgrid(cuts, cuts), axis=-1) - side / 2  # (row, column, (x, y))
    angle, slant = np.deg2rad(random.normal(0, 8)), random.normal(0, 0.2)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    nodes = nodes @ (turn @ np.array([[1, slant], [0, 1]])).T * 1.25  # a margin for what moves out
    nodes += side / 2 + random.normal(0, 0.035 * side, nodes.shape)
    mesh = [
        (
            (int(cuts[x]), int(cuts[y]), int(cuts[x + 1]), int(cuts[y + 1])),
            tuple(nodes[[y, y + 1, y + 1, y], [x, x, x + 1, x + 1]].flatten().tolist()),
        )
        for y in range(_MESH)
        for x in range(_MESH)
    ]
    return image.transform(image.size, Image.Transform.MESH, mesh, resample=Image.Resampling.BILINEAR)


def count_ink(ink: Image.Image, random: np.random.Generator) -> np.ndarray:
    """Fit ink to the bitmap's height at a random width and place; count it by cell: (8, 8), 0 to 16.

    In the target every digit, a 1 too, has about the same ink: its strokes are as thick as that takes. So the
    border of the ink is drawn where it encloses a random share of the bitmap near the target's.
    """
    width = int(np.clip(round(ink.width / ink.height * _BITMAP * random.uniform(0.8, 1.1)), 5, 26))
    left = int(np.clip((_BITMAP - width) // 2 + random.integers(-2, 3), 0, _BITMAP - width))
    paper = Image.new("L", (_BITMAP, _BITMAP))
    paper.paste(ink.resize((width, _BITMAP), Image.Resampling.BOX), (left, 0))
    grey = np.asarray(paper.filter(ImageFilter.GaussianBlur(random.uniform(1.0, 2.0))), dtype=float)
    bitmap = grey > np.quantile(grey, 1 - random.uniform(0.24, 0.37))
    cell = _BITMAP // _GRID
    return bitmap.reshape(_GRID, cell, _GRID, cell).sum((1, 3)).astype(float)


@contextlib.contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder beside ``folder`` that takes its name when all is written.

    Unlike `tldist.files.atomic_folder` it does not wait for the disk: thousands of small files that can be
    made again are not worth that.
    """
    making = folder.parent / f".tmp-{folder.name}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    yield making
    making.rename(folder)


def _save(path: Path, ink: np.ndarray) -> None:
    """Write ink (8, 8), 0 to 16, as a grey PNG of `SIDE` pixels: white ink on black."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray((ink * (255 / 16)).round().astype(np.uint8))
    image.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(path)
