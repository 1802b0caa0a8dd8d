"""Augmentation depends on (seed, epoch, sample) alone, and cuts what it says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.support import encode
from tldist.data.augment import Augmentation, augment, random_box
from tldist.runtime.preprocess import Preprocessing, prepare


@pytest.fixture
def photo() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (30, 41, 3), dtype=np.uint8)
    return encode(np.asarray(Image.fromarray(noise).resize((410, 300))), "jpg")


def test_augment__same_seed_epoch_sample_same_pixels(photo: bytes) -> None:
    how, what = Preprocessing(64, 64, 72), Augmentation(brightness=0.3)
    first = augment(photo, how, what, 1, 2, 3)
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, augment(photo, how, what, 1, 2, 3))
    others = [augment(photo, how, what, *key) for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0))]
    assert not any(np.array_equal(first, other) for other in others)


def test_augment__nothing_asked_is_the_preprocessing_of_evaluation(photo: bytes) -> None:
    how = Preprocessing(64, 64, 72)
    plain = augment(photo, how, Augmentation(crop=None, flip=False), 0, 0, 0)
    assert np.array_equal(plain, prepare(photo, how))


def test_augment__whole_area_is_a_plain_resize(photo: bytes) -> None:
    square = encode(np.random.default_rng(1).integers(0, 255, (96, 96, 3), dtype=np.uint8))
    how = Preprocessing(48, 48, 48)
    cut = augment(square, how, Augmentation(crop=(1.0, 1.0), ratio=(1.0, 1.0), flip=False), 0, 0, 0)
    assert np.array_equal(cut, prepare(square, how))


@pytest.mark.parametrize("size", [(640, 480), (31, 57), (5, 400), (1, 1)])
def test_random_box__lies_inside_with_the_asked_area(size: tuple[int, int]) -> None:
    random = np.random.default_rng(0)
    for _ in range(200):
        left, top, width, height = random_box(size, (0.2, 0.9), (0.75, 4 / 3), random)
        assert 0 <= left <= left + width <= size[0]
        assert 0 <= top <= top + height <= size[1]
        if min(size) > 100:
            assert 0.19 < width * height / (size[0] * size[1]) < 0.91


def test_flip__half_of_the_images(photo: bytes) -> None:
    how, what = Preprocessing(32, 32, 32), Augmentation(crop=None, flip=True)
    plain = prepare(photo, how)
    flipped = [not np.array_equal(augment(photo, how, what, 0, 0, sample), plain) for sample in range(200)]
    assert 70 < sum(flipped) < 130
