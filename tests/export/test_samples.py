"""The images that parity is measured on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support import make_images
from tldist.domain.recipe import DataRecipe
from tldist.errors import DomainError
from tldist.export.natural import natural_images
from tldist.export.samples import gather_samples
from tldist.runtime.preprocess import Preprocessing, prepare
from tldist.runtime.reference import Reference, read_reference, write_reference

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


def test_reference__round_trip(tmp_path: Path) -> None:
    samples = gather_samples(None, 2, HOW)
    random = np.random.default_rng(0)
    expected = {"logits": random.normal(size=(9, 3)).astype(np.float32)}
    referee = {"logits": random.normal(size=(9, 3))}
    write_reference(tmp_path / "r", Reference(samples, expected, referee))
    read = read_reference(tmp_path / "r")
    np.testing.assert_array_equal(read.samples.images, samples.images)
    np.testing.assert_array_equal(read.expected["logits"], expected["logits"])
    np.testing.assert_array_equal(read.referee["logits"], referee["logits"])
    assert (read.samples.groups, read.samples.ids) == (samples.groups, samples.ids)
