"""The demo's domains: real files, comparable with one another, and the same for the same seed."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont
from sklearn.datasets import load_digits

from tldist.demo.domains import (
    DIGITS,
    SIDE,
    STYLES,
    find_font,
    print_character,
    write_pool,
    write_source,
    write_target,
)
from tldist.domain import open_domain


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three source domains, small."""
    folder = tmp_path_factory.mktemp("sources")
    return {style: write_source(folder / style, style, 15, seed=3) for style in STYLES}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The target domain."""
    return write_target(tmp_path_factory.mktemp("target") / "t", draw=0, labelled=5)


def pictures(folder: Path) -> np.ndarray:
    """All images of a domain: uint8 (N, H, W)."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))])


def test_fonts__are_carried_by_matplotlib() -> None:
    faces = [face for style in STYLES.values() for face in style]
    assert all(find_font(name).is_file() for name, _ in faces)
    assert len(set(faces)) == len(faces), "a face belongs to one domain"


def test_fonts__tell_the_ten_digits_apart() -> None:
    for name, zero in chain(*STYLES.values()):
        font = ImageFont.truetype(str(find_font(name)), 64)
        masks = [font.getmask(chr(ord(zero) + int(digit))) for digit in DIGITS]
        assert len({(mask.size, bytes(mask)) for mask in masks}) == 10, f"{name} prints two digits alike"


def test_source__has_train_and_val_of_every_digit(sources: dict[str, Path]) -> None:
    for folder in sources.values():
        domain = open_domain(folder)
        assert domain.split_counts == {"train": 120, "val": 30}
        assert domain.classes == DIGITS
        assert pictures(folder).shape == (150, SIDE, SIDE)


def test_source__is_a_function_of_seed_and_style(tmp_path: Path) -> None:
    def read(name: str, style: str, seed: int) -> np.ndarray:
        return pictures(write_source(tmp_path / name, style, 3, seed))

    first = read("a", "serif", 1)
    assert np.array_equal(first, read("b", "serif", 1))
    assert not np.array_equal(first, read("c", "serif", 2))
    assert not np.array_equal(first, read("d", "sans", 1))


def test_domains__are_comparable_and_yet_differ(sources: dict[str, Path], target: Path) -> None:
    real = pictures(target).astype(float)
    for folder in sources.values():
        printed = pictures(folder).astype(float)
        assert abs(printed.mean() - real.mean()) < 20, "as much ink, in grey values of 255"
        assert abs(printed.std() - real.std()) < 15
        # Digit by digit the mean pictures differ by more than two halves of the target do from each other.
        half = np.random.default_rng(0).permutation(len(real)) % 2 == 0
        noise = np.abs(real[half].mean(0) - real[~half].mean(0)).mean()
        assert np.abs(printed.mean(0) - real.mean(0)).mean() > 3 * noise


def test_pool__is_the_union_of_the_sources(sources: dict[str, Path], tmp_path: Path) -> None:
    pool = open_domain(write_pool(tmp_path / "pool", list(sources.values())))
    assert pool.split_counts == {"train": 360, "val": 90}
    assert {pool.id(i).rsplit("/", 1)[1].split("-")[0] for i in range(len(pool))} == set(STYLES)


def test_target__is_every_real_digit_once_with_few_in_train(target: Path) -> None:
    digits = load_digits()
    domain = open_domain(target)
    assert domain.split_counts == {"train": 50, "test": 1747}
    train = domain.split("train")
    assert np.bincount(train.labels).tolist() == [5] * 10
    numbers = [int(Path(domain.id(i)).stem) for i in range(len(domain))]
    assert sorted(numbers) == list(range(1797))
    assert all(domain.classes[label] == str(digits.target[n]) for label, n in zip(domain.labels, numbers))


def test_target__draws_differ(target: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "t", draw=1, labelled=5)
    names = [{path.name for path in (folder / "train").rglob("*.png")} for folder in (target, other)]
    assert len(names[0] & names[1]) < 25


def test_target__pictures_are_the_digits(target: Path) -> None:
    digits = load_digits()
    for path in sorted((target / "train").rglob("*.png"))[:10]:
        small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX), dtype=float) * 16 / 255
        truth = digits.images[int(path.stem)]
        assert np.corrcoef(small.ravel(), truth.ravel())[0, 1] > 0.95


def test_print__ink_is_counted_as_in_the_target() -> None:
    font = ImageFont.truetype(str(find_font("DejaVuSans")), 96)
    random = np.random.default_rng(0)
    for digit in DIGITS:
        ink = print_character(digit, font, random)
        assert ink.shape == (8, 8)
        assert 0 <= ink.min() < ink.max() <= 16
        assert np.array_equal(ink, ink.round()), "a count of cells"
        assert ink[0].any(), "from the top"
        assert ink[-1].any(), "to the bottom"


def test_write__what_is_there_is_left_alone(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "s", "sans", 2, 0)
    (folder / "mark").touch()
    assert (write_source(folder, "sans", 2, 0) / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
