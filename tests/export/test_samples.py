"""The images that parity is measured on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.support import make_images
from tldist.domain.recipe import DataRecipe
from tldist.errors import DomainError, PackageError
from tldist.export.natural import natural_images
from tldist.export.samples import gather_samples
from tldist.runtime.preprocess import Preprocessing, prepare
from tldist.runtime.reference import Reference, Samples, read_reference, thin, write_reference

HOW = Preprocessing(24, 20, 26)


def test_samples__extremes_are_there_and_fill_an_odd_batch() -> None:
    samples = gather_samples(None, 1, HOW)
    assert samples.images.shape == (8, 24, 20, 3)
    assert samples.images.dtype == np.uint8
    group = samples.group_of
    assert not samples.images[group == "black"].any()
    assert (samples.images[group == "white"] == 255).all()
    noise = samples.images[group == "noise"]
    assert 120 < noise.mean() < 135
    assert len(samples.ids) == len(set(samples.ids)) == 8


def test_samples__real_ones_are_the_domains_own_pixels(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", {"a": 5, "b": 5})
    (folder / "a" / "broken.png").write_bytes(b"no image")
    samples = gather_samples(DataRecipe(path=str(folder)), 11, HOW)
    assert dict(samples.groups)["real"] == 10
    for image, name in zip(samples.images[:10], samples.ids[:10]):
        np.testing.assert_array_equal(image, prepare((folder / name).read_bytes(), HOW))


def test_samples__none_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DomainError, match="can be decoded"):
        gather_samples(DataRecipe(path=str(tmp_path / "d")), 4, HOW)


def test_natural_images__differ_and_are_smooth() -> None:
    images = natural_images(6, 64, 48).astype(float)
    neighbours = np.abs(np.diff(images, axis=2)).mean()
    shuffled = np.random.default_rng(0).permuted(images, axis=2)
    assert neighbours < 0.35 * np.abs(np.diff(shuffled, axis=2)).mean()
    assert np.abs(images[0] - images[1]).mean() > 10
    assert min(image.std() for image in images) > 15
    np.testing.assert_array_equal(images, natural_images(6, 64, 48))


def test_samples__dynamic_adds_a_second_size_that_is_not_square(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", {"a": 5, "b": 5})
    samples = gather_samples(DataRecipe(path=str(folder)), 6, HOW, "dynamic")
    assert samples.images.shape == (13, 24, 20, 3)
    assert {picture.shape for picture in samples.pictures} == {(56, 84, 3)}
    assert dict(samples.groups) == {"real": 6, "black": 1, "white": 1, "noise": 5, "56x84": 5}
    assert len(samples.ids) == len(set(samples.ids)) == len(samples) == 18
    for picture, name in zip(samples.pictures, samples.ids[13:]):
        file = (folder / name.removesuffix("-56x84")).read_bytes()
        np.testing.assert_array_equal(picture, prepare(file, Preprocessing(56, 84, 26)))


@pytest.mark.parametrize("real", [False, True])
def test_samples__whole_pictures_have_many_sizes(tmp_path: Path, real: bool) -> None:
    data = None
    if real:
        (tmp_path / "d" / "a").mkdir(parents=True)
        for number, size in enumerate([(31, 50), (90, 40), (300, 200)]):
            Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "d" / "a" / f"{number}.png")
        data = DataRecipe(path=str(tmp_path / "d"))
    samples = gather_samples(data, 7, HOW, "picture")
    assert samples.images.shape == (0, 24, 20, 3)
    assert len(samples.pictures) == len(samples) == len(samples.ids)
    shapes = {
        picture.shape[:2]
        for picture, group in zip(samples.pictures, samples.group_of)
        if group in ("real", "generated")
    }
    # 200 pixels are more than three times 26: reduced by a whole factor.
    assert shapes == {(50, 31), (40, 90), (100, 150)} if real else len(shapes) == 6
    assert any(tall > wide for tall, wide in shapes)
    assert any(tall < wide for tall, wide in shapes)
    assert [count for _, count in samples.groups[1:]] == [1, 1, 5]


def mixed() -> Samples:
    """Four images of one size and three of others: groups run across both kinds."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    others = tuple(random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((7, 6), (5, 9), (7, 6)))
    return Samples(images, (("real", 3), ("black", 2), ("8x9", 2)), tuple("abcdefg"), others)


def test_samples__by_size_gives_every_image_once() -> None:
    samples = mixed()
    every = [*samples.images, *samples.pictures]
    parts = list(samples.by_size())
    assert [images.shape for _, images in parts] == [(4, 5, 6, 3), (2, 7, 6, 3), (1, 5, 9, 3)]
    assert sorted(np.concatenate([rows for rows, _ in parts]).tolist()) == list(range(7))
    for rows, images in parts:
        for row, image in zip(rows, images):
            np.testing.assert_array_equal(image, every[row])


def test_samples__take_keeps_rows_with_their_groups() -> None:
    samples = mixed().take(np.array([1, 2, 4, 6]))
    assert samples.ids == ("b", "c", "e", "g")
    assert samples.groups == (("real", 2), ("black", 1), ("8x9", 1))
    np.testing.assert_array_equal(samples.images, mixed().images[1:3])
    assert [picture.shape for picture in samples.pictures] == [(7, 6, 3), (7, 6, 3)]
    np.testing.assert_array_equal(samples.pictures[1], mixed().pictures[2])


def test_thin__keeps_extremes_and_spreads_over_the_pictures() -> None:
    images = np.zeros((207, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(207)
    groups = (("real", 200), ("black", 1), ("white", 1), ("noise", 5))
    samples = Samples(images, groups, tuple(map(str, range(207))))
    answers = np.arange(207, dtype=np.float32)[:, None]
    part = thin(
        Reference(samples, {"logits": answers}, {"logits": answers.astype(float)}, {"logits": answers})
    )
    assert dict(part.samples.groups) == {"real": 16, "black": 1, "white": 1, "noise": 5}
    kept = part.samples.images[:, 0, 0, 0].tolist()
    assert kept[0] == 0
    assert kept[15] == 199
    assert max(np.diff(kept[:16])) <= 14
    for values in (part.expected, part.referee, part.exported):
        assert values["logits"][:, 0].tolist() == kept
    assert part.samples.ids == tuple(map(str, kept))
    assert thin(part).samples.ids == part.samples.ids
    few = dict(thin(part, most=2).samples.groups)
    assert few == {"real": 2, "black": 1, "white": 1, "noise": 5}


def test_thin__large_pictures_stop_at_their_bytes() -> None:
    pictures = tuple(np.zeros((1000, 1000, 3), np.uint8) for _ in range(8))
    samples = Samples(np.zeros((0, 4, 4, 3), np.uint8), (("real", 8),), tuple("abcdefgh"), pictures)
    assert len(thin(Reference(samples, {"x": np.zeros((8, 1), np.float32)})).samples) == 5  # of 3 MB each


def test_reference__round_trip(tmp_path: Path) -> None:
    samples = gather_samples(None, 2, HOW, "dynamic")
    random = np.random.default_rng(0)
    parts = [{"logits": random.normal(size=(len(samples), 3)).astype(np.float32)} for _ in range(3)]
    referee = {"logits": random.normal(size=(len(samples), 3))}
    written = Reference(samples, parts[0], referee, parts[1], parts[2])
    write_reference(tmp_path / "r", written)
    read = read_reference(tmp_path / "r")
    np.testing.assert_array_equal(read.samples.images, samples.images)
    assert len(read.samples.pictures) == 2
    for one, other in zip(read.samples.pictures, samples.pictures):
        np.testing.assert_array_equal(one, other)
    for name in ("expected", "referee", "exported", "fitted"):
        one, other = getattr(read, name)["logits"], getattr(written, name)["logits"]
        np.testing.assert_array_equal(one, other)
        assert one.dtype == other.dtype
    assert (read.samples.groups, read.samples.ids) == (samples.groups, samples.ids)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, m: t.update(images=t["images"].astype(np.float32)), "images are float32"),
        (lambda t, m: t.update(images=t["images"][:, :, :, :2]), "expected uint8"),
        (lambda t, m: t.update({"picture.0": np.zeros((3, 3), np.uint8)}), "a picture is"),
        (lambda t, m: t.update({"picture.x": np.zeros((3, 3, 3), np.uint8)}), "cannot be read"),
        (lambda t, m: t.update({"expected.logits": np.zeros((4, 3), np.float32)}), "for 9 images"),
        (lambda t, m: t.update({"exported.logits": np.zeros((9, 3), np.int64)}), "int64"),
        (lambda t, m: m.update(groups='[["real", 8]]'), "9 images, 8 in groups"),
        (lambda t, m: m.update(groups='[["real", 10], ["x", -1]]'), "in groups"),
        (lambda t, m: m.update(ids='["a"]'), "1 names"),
        (lambda t, m: m.pop("ids"), "cannot be read"),
        (lambda t, m: m.update(ids="3"), "cannot be read"),
    ],
)
def test_reference__file_that_is_none_is_refused(
    tmp_path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], object], words: str
) -> None:
    samples = gather_samples(None, 2, HOW)
    write_reference(tmp_path / "r", Reference(samples, {"logits": np.zeros((9, 3), np.float32)}))
    with safe_open(tmp_path / "r", framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        about = dict(file.metadata())
    change(tensors, about)
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, tmp_path / "r", about)
    with pytest.raises(PackageError, match=words):
        read_reference(tmp_path / "r")
