"""Images in more than one split: found as files, found again when compressed or resized, and no others."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support_processes import run_ranks
from tldist import distributed
from tldist.data.duplicates import LARGEST_DISTANCE, Duplicate, find_duplicates
from tldist.domain import open_domain
from tldist.domain.recipe import DataRecipe


def picture(random: np.random.Generator, size: int = 96) -> Image.Image:
    """Smooth noise: something to see at every scale."""
    coarse = random.integers(0, 255, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    pictures = [picture(random) for _ in range(30)]
    for number, image in enumerate(pictures):
        (tmp_path / "train/a" / f"{number:02}.jpg").write_bytes(jpeg(image, 90))
    (tmp_path / "val/a/exact.jpg").write_bytes((tmp_path / "train/a/03.jpg").read_bytes())
    (tmp_path / "val/a/compressed.jpg").write_bytes(jpeg(pictures[4], 30))
    pictures[5].resize((70, 70), Image.Resampling.BICUBIC).save(tmp_path / "test/a/smaller.png")
    (tmp_path / "test/a/broken.jpg").write_bytes(b"nothing")
    for number in range(30):
        (tmp_path / "val/a" / f"new{number}.jpg").write_bytes(jpeg(picture(random), 90))
    # Within one split nothing is looked for; and flat pictures of different greys are not the same.
    (tmp_path / "train/a/again.jpg").write_bytes((tmp_path / "train/a/07.jpg").read_bytes())
    Image.new("RGB", (64, 64), (90, 90, 90)).save(tmp_path / "train/a/flat.png")
    Image.new("RGB", (64, 64), (200, 200, 200)).save(tmp_path / "test/a/flat.png")
    return tmp_path


def find(folder: Path) -> list[Duplicate]:
    domain = open_domain(DataRecipe.make(path=str(folder)))
    splits = {name: domain.split(name) for name in domain.split_counts}
    return find_duplicates(splits, distributed.start(), workers=2)


def test_duplicates__exact_and_near_ones_across_splits_and_no_others(data: Path) -> None:
    found = find(data)
    assert [(Path(d.first[1]).stem, Path(d.second[1]).stem, d.exact) for d in found] == [
        ("03", "exact", True), ("04", "compressed", False), ("05", "smaller", False),
    ]  # fmt: skip
    assert {d.second[0] for d in found} == {"val", "test"}


def test_duplicates__the_same_for_any_number_of_processes(data: Path) -> None:
    assert run_ranks(find, 3, data) == [find(data)] * 3


def test_bands__miss_no_hash_within_the_distance() -> None:
    """Of all pairs of random hashes that differ in up to so many bits, each shares a band."""
    from tldist.data import duplicates

    random = np.random.default_rng(1)
    grey = np.zeros((32, 32), np.uint8)
    prints = []
    for number in range(300):
        value = int(random.integers(0, 2**63))
        flips = random.choice(64, int(random.integers(0, LARGEST_DISTANCE + 1)), replace=False)
        other = value
        for bit in flips.tolist():
            other ^= 1 << bit
        prints += [
            duplicates._Print("train", number, bytes([0, number % 256, number // 256]), value, grey),
            duplicates._Print("val", number, bytes([1, number % 256, number // 256]), other, grey),
        ]
    found = {(a.index, b.index) for a, b in duplicates._pairs(prints)}
    assert {(number, number) for number in range(300)} <= found
