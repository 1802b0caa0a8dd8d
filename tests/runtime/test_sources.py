"""Pictures from anywhere: in order, sizes apart, decoded as in training, one bad one costs no other."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.embed.tiny import SIZE, tiny_package
from tldist.errors import PackageError
from tldist.runtime import sources
from tldist.runtime.decode import BadImage
from tldist.runtime.package import Package
from tldist.runtime.predict import Prediction, features, predict, probabilities
from tldist.runtime.preprocess import Preprocessing, prepare, prepare_picture
from tldist.runtime.sources import read_source, run_sources

WEIGHTS = np.random.default_rng(5).normal(size=(3, 6)).astype(np.float32)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package.open(tiny_package(tmp_path_factory.mktemp("a") / "p", WEIGHTS))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package.open(tiny_package(tmp_path_factory.mktemp("b") / "p", WEIGHTS, kind="picture"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package.open(tiny_package(tmp_path_factory.mktemp("c") / "p", WEIGHTS, "logits"))


def encode(picture: np.ndarray, fmt: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, fmt, quality=95)
    return buffer.getvalue()


def pictures(sizes: list[tuple[int, int]], seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in sizes]


SIZES = [(8, 9), (20, 20), (9, 8), (8, 9), (31, 7), (20, 20), (8, 9), (1, 1), (20, 20), (8, 9)]


@pytest.mark.parametrize("workers", [0, 1, 3, None])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 50])
def test_features__pictures_of_many_sizes_keep_their_order(
    whole: Package, tmp_path: Path, batch_size: int, workers: int | None
) -> None:
    given = pictures(SIZES)
    mixed: list[sources.Source] = list(given)
    mixed[1] = encode(given[1])
    mixed[4] = tmp_path / "four.png"
    (tmp_path / "four.png").write_bytes(encode(given[4]))
    mixed[7] = str(tmp_path / "seven.png")
    (tmp_path / "seven.png").write_bytes(encode(given[7]))
    found = features(whole, mixed, batch_size, workers=workers)
    expected = np.stack([picture.mean((0, 1)) for picture in given]) @ WEIGHTS
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_run_sources__batches_are_full_and_of_one_size(whole: Package) -> None:
    sizes = [(8, 9), (5, 5)] * 7
    answers = list(run_sources(whole, pictures(sizes), batch_size=3))
    assert sorted(place for answer in answers for place in answer.places) == list(range(14))
    assert [len(answer.places) for answer in answers] == [3, 3, 3, 3, 1, 1]
    assert all(len({place % 2 for place in answer.places}) == 1 for answer in answers)


def test_run_sources__few_pictures_of_many_sizes_do_not_fill_the_memory(
    whole: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_MOST_WAITING", 3 * 40 * 40 * 3)
    sizes = [(40, 40 - number % 20) for number in range(40)]
    answers = list(run_sources(whole, pictures(sizes), batch_size=100, workers=0))
    assert sorted(place for answer in answers for place in answer.places) == list(range(40))
    assert 10 < len(answers) < 40, "the largest queues have run before they were full"
    same = list(run_sources(whole, pictures([(40, 40)] * 12), batch_size=100, workers=0))
    assert [len(answer.places) for answer in same] == [4, 4, 4]


def test_read_source__whole_pictures_are_decoded_as_in_training(whole: Package, fixed: Package) -> None:
    coarse = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    large = np.asarray(Image.fromarray(coarse).resize((900, 600), Image.Resampling.BICUBIC))
    data = encode(large, "JPEG")
    picture = read_source(data, whole.config)
    assert picture.shape == (75, 113, 3), "a large JPEG is decoded at an eighth of its size"
    how = whole.config.preprocessing
    np.testing.assert_array_equal(picture, prepare_picture(data, how))
    ours = Image.fromarray(picture).resize((48, SIZE), Image.Resampling.BILINEAR).crop((8, 0, 40, SIZE))
    np.testing.assert_array_equal(prepare(data, Preprocessing(SIZE, SIZE, SIZE)), np.asarray(ours))
    np.testing.assert_array_equal(read_source(data, fixed.config), prepare(data, how))
    png = encode(large)
    np.testing.assert_array_equal(read_source(png, whole.config), large)
    np.testing.assert_array_equal(read_source(large, whole.config), large)


@pytest.mark.parametrize("workers", [0, 2])
def test_predict__a_bad_picture_is_named_and_costs_no_other(
    classifier: Package, tmp_path: Path, workers: int
) -> None:
    good = [encode(picture) for picture in pictures([(40, 40)] * 9)]
    mixed: list[sources.Source] = list(good)
    mixed[3] = b"no image"
    mixed[5] = tmp_path / "none.png"
    mixed[8] = np.zeros((3, 3), np.uint8)
    found = predict(classifier, mixed, batch_size=2, workers=workers, errors="return")
    alone = predict(classifier, good)
    for place, (one, other) in enumerate(zip(found, alone)):
        if place in (3, 5, 8):
            assert isinstance(one, BadImage)
        else:
            assert isinstance(one, Prediction)
            assert one.label == other.label
            assert one.probability == pytest.approx(other.probability, abs=1e-6)
    assert "source 3" in str(found[3])
    assert "none.png" in str(found[5])
    assert "source 8" in str(found[8])
    with pytest.raises(BadImage, match="source 3"):
        predict(classifier, mixed, batch_size=2, workers=workers)


def test_features__bad_pictures_in_their_places(fixed: Package) -> None:
    given = [encode(picture) for picture in pictures([(SIZE, SIZE)] * 3)]
    found = features(fixed, [given[0], b"", given[2]], errors="return")
    whole_rows = features(fixed, [given[0], given[2]])
    assert isinstance(found[1], BadImage)
    np.testing.assert_allclose(found[0], whole_rows[0], rtol=1e-6)  # type: ignore[arg-type]
    np.testing.assert_allclose(found[2], whole_rows[1], rtol=1e-6)  # type: ignore[arg-type]
    with pytest.raises(BadImage, match="source 1: empty file"):
        features(fixed, [given[0], b""])
    assert features(fixed, []).shape == (0, 6)


def test_features__of_a_package_without_them(classifier: Package, fixed: Package) -> None:
    with pytest.raises(PackageError, match="output=features"):
        features(classifier, [])
    with pytest.raises(PackageError, match=r"predict\.features"):
        predict(fixed, [])
    with pytest.raises(ValueError, match="batch_size"):
        features(fixed, pictures([(9, 9)]), 0)


def test_probabilities__temperature_and_independent_classes() -> None:
    logits = np.array([[2.0, -1.0, 0.5]], np.float32)
    powers = np.exp(logits.astype(np.float64) / 2.5)
    np.testing.assert_allclose(probabilities({"logits": logits}, 2.5), powers / powers.sum(), rtol=1e-12)
    alone = probabilities({"logits": logits}, 2.5, "multilabel")
    np.testing.assert_allclose(alone, powers / (1 + powers), rtol=1e-12)
    both = {"logits": logits, "probabilities": np.array([[0.1, 0.2, 0.7]], np.float32)}
    np.testing.assert_allclose(probabilities(both, 2.5), [[0.1, 0.2, 0.7]], rtol=1e-6)
