"""The images that parity is measured on: real ones, or generated ones like them, and extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tldist.domain import DataRecipe, Domain, open_domain
from tldist.errors import DomainError, RecipeError
from tldist.export.natural import extreme_images, natural_images
from tldist.export.profile import Profile
from tldist.progress import warn
from tldist.runtime.decode import BadImage, decode_rgb, open_image
from tldist.runtime.package import Input
from tldist.runtime.preprocess import Preprocessing, prepare
from tldist.runtime.reference import Samples

OTHER_SIZE = 5
"""Pictures that a graph of any size is compared on at a second size too, neither square nor the first."""
_STRIDE = 32
"""The second size is larger by once and twice this: what convolutional networks divide their input by."""
_LARGEST = 3.0
"""Whole pictures are reduced to this multiple of the shorter side that they are resized to: a 12-megapixel
photo would prove no more and weigh 36 MB."""
_SHAPES = ((1.0, 1.5), (1.5, 1.1), (0.7, 0.9), (2.3, 1.7), (1.0, 1.0), (1.3, 3.1))
"""Height and width of generated whole pictures, as multiples of the shorter side of the resize."""


def gather_samples(
    data: DataRecipe | None, count: int, how: Preprocessing, takes: Input = "fixed"
) -> Samples:
    """Images to compare on: ``count`` real or generated ones, then black, white and noise.

    Args:
        data: a domain to take real ones from; None: generated ones.
        count: of them.
        how: the preprocessing.
        takes: what the graph takes. ``dynamic``: some pictures at a second size too; ``picture``: whole
            pictures of many sizes.

    Raises:
        DomainError: the domain cannot be opened, or none of its images can be decoded.
    """
    if takes == "picture":
        return _whole_pictures(data, count, how)
    images, name, ids = _pictures(data, count, how)
    extremes = extreme_images(how.height, how.width)
    groups = [(name, len(images)), *((group, len(part)) for group, part in extremes.items())]
    names = [*ids, *(f"{group}-{n}" for group, part in extremes.items() for n in range(len(part)))]
    others: tuple[np.ndarray, ...] = ()
    if takes == "dynamic":
        second = replace(how, height=how.height + _STRIDE, width=how.width + 2 * _STRIDE)
        more, _, more_ids = _pictures(data, min(count, OTHER_SIZE), second)
        others, size = tuple(more), f"{second.height}x{second.width}"
        groups.append((size, len(others)))
        names += [f"{name}-{size}" for name in more_ids]
    return Samples(np.concatenate([images, *extremes.values()]), tuple(groups), tuple(names), others)


def _pictures(
    data: DataRecipe | None, count: int, how: Preprocessing
) -> tuple[np.ndarray, str, tuple[str, ...]]:
    """Images of the model's size, what they are, and their names."""
    if data is None:
        ids = tuple(f"generated-{number}" for number in range(count))
        return natural_images(count, how.height, how.width), "generated", ids
    images, ids = real_images(data, count, how)
    return images, "real", ids


def _whole_pictures(data: DataRecipe | None, count: int, how: Preprocessing) -> Samples:
    """Pictures before any resize; extremes are as large as the resize makes them."""
    side = max(how.resize, how.height, how.width)
    if data is None:
        sizes = [(round(side * tall), round(side * wide)) for tall, wide in _SHAPES]
        shapes = [sizes[number % len(sizes)] for number in range(count)]
        pictures = [natural_images(1, *shape, seed=number)[0] for number, shape in enumerate(shapes)]
        name, ids = "generated", [f"generated-{number}" for number in range(count)]
    else:
        name = "real"
        pictures, ids = _decoded(chosen_images(data, count), lambda file: whole_picture(file, side))
    extremes = extreme_images(side, side + _STRIDE)
    groups = ((name, len(pictures)), *((group, len(part)) for group, part in extremes.items()))
    ids += [f"{group}-{number}" for group, part in extremes.items() for number in range(len(part))]
    for part in extremes.values():
        pictures += list(part)
    none = np.zeros((0, how.height, how.width, 3), np.uint8)
    return Samples(none, groups, tuple(ids), tuple(pictures))


def whole_picture(file: bytes, side: int) -> np.ndarray:
    """The bytes of an image file to a whole picture, uint8 (H, W, 3), reduced by a whole factor where it is
    much larger than ``side``, the shorter side that it will be resized to."""
    picture = decode_rgb(open_image(file))
    factor = int(min(picture.size) / (_LARGEST * side))
    return np.array(picture.reduce(factor) if factor > 1 else picture)


def calibration_images(
    calibration: DataRecipe | None, data: DataRecipe | None, profile: Profile, how: Preprocessing
) -> np.ndarray | None:
    """uint8 (N, H, W, 3) that the ranges of int8 are measured on; None where the profile needs none.

    Args:
        calibration: the domain that was named for it; None: the training split of ``data``, so that what is
            compared was not calibrated on where the domain has splits.
        data: the domain that parity is measured on.
        profile: says how many.
        how: the preprocessing.

    Raises:
        RecipeError: there is no domain.
        DomainError: none of its images can be decoded.
    """
    if profile.precision != "int8":
        return None
    source = calibration or data
    if source is None:
        raise RecipeError("int8 needs pictures to calibrate on: give calibration=D, or data=D.")
    domain = open_domain(source)
    if not source.split and calibration is None:
        domain = domain.training_split()
    images, _ = _decoded(domain.limited(profile.quantization.samples), lambda file: prepare(file, how))
    return np.stack(images)


def chosen_images(data: DataRecipe, count: int) -> Domain:
    """The part of a domain that is compared: at most ``count`` images, spread over its classes."""
    domain = open_domain(data)
    return (domain if data.split else domain.evaluation_split()).limited(count)


def real_images(data: DataRecipe, count: int, how: Preprocessing) -> tuple[np.ndarray, tuple[str, ...]]:
    """At most ``count`` images of a domain, spread over its classes: uint8 (N, H, W, 3), and their ids."""
    images, ids = _decoded(chosen_images(data, count), lambda file: prepare(file, how))
    return np.stack(images), tuple(ids)


def _decoded(domain: Domain, decode: Callable[[bytes], np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """The images of a domain that can be decoded, and their ids."""
    images, ids = [], []
    for index in range(len(domain)):
        try:
            images.append(decode(domain.read(index)))
            ids.append(domain.id(index))
        except BadImage as reason:
            warn(f"{domain.id(index)}: {reason}; left out of the comparison.")
    if not images:
        raise DomainError(f"{domain.name}: no image of it can be decoded to compare on.")
    return images, ids
