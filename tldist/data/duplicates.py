"""Images that lie in more than one split: they make a measured quality better than it is."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations

import imagehash
import numpy as np
from PIL import Image

from tldist.distributed import Team
from tldist.domain import Domain
from tldist.progress import progress_bar
from tldist.runtime.decode import BadImage, decode_rgb, open_image

LARGEST_DISTANCE = 3
"""Bits of 64 in which the perceptual hashes of near-duplicates may differ."""
LARGEST_DIFFERENCE = 4.0
"""Mean difference of their thumbnails, in grey levels of 255: what compression and resizing leave."""

_BANDS = LARGEST_DISTANCE + 1  # two hashes that differ in so few bits agree in at least one band of bits
_THUMBNAIL = 32


@dataclass(frozen=True)
class Duplicate:
    """Two images of different splits that are the same.

    Attributes:
        first, second: (split, id).
        exact: the files are equal; else they look alike.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    exact: bool


@dataclass(frozen=True)
class _Print:
    """What is compared of an image."""

    split: str
    index: int
    content: bytes  # SHA-256 of the file
    perceptual: int  # 64 bits
    thumbnail: np.ndarray  # uint8 (_THUMBNAIL, _THUMBNAIL), grey


def find_duplicates(splits: Mapping[str, Domain], team: Team, workers: int) -> list[Duplicate]:
    """Images that occur in more than one split, as the same file or looking the same.

    Compared are perceptual hashes of 64 bits (`imagehash.phash`: the signs of the low frequencies of a
    32 x 32 grey picture), then thumbnails; equal files have both alike, and are told by their SHA-256. It
    finds what was compressed or resized again, not what was cropped, turned or recoloured. Broken images are
    left out.

    Args:
        splits: the domains by the names of their splits.
        team: each process reads its share; called by all of them together.
        workers: threads of each.

    Returns:
        The pairs, in the order of the splits and images; the same on all processes.
    """
    mine = [
        (split, index)
        for split, domain in splits.items()
        for index in range(team.rank, len(domain), team.size)
    ]
    prints: list[_Print] = []
    with (
        progress_bar(len(mine), "img", "look for duplicates", keep=False) as bar,
        ThreadPoolExecutor(max(1, workers)) as pool,
    ):
        for found in pool.map(lambda place: _print(splits[place[0]], *place), mine):
            bar.update(1)
            if found is not None:
                prints.append(found)
    order = {split: place for place, split in enumerate(splits)}
    everything = [one for part in team.gather(prints) for one in part]
    everything.sort(key=lambda one: (order[one.split], one.index))
    return [
        Duplicate(
            (first.split, splits[first.split].id(first.index)),
            (second.split, splits[second.split].id(second.index)),
            first.content == second.content,
        )
        for first, second in _pairs(everything)
    ]


def _print(domain: Domain, split: str, index: int) -> _Print | None:
    try:
        data = domain.read(index)
        picture = decode_rgb(open_image(data), at_least=(4 * _THUMBNAIL, 4 * _THUMBNAIL)).convert("L")
    except BadImage:
        return None
    small = picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    perceptual = int(str(imagehash.phash(picture, hash_size=8)), 16)
    return _Print(split, index, hashlib.sha256(data).digest(), perceptual, np.asarray(small))


def _pairs(prints: list[_Print]) -> Iterator[tuple[_Print, _Print]]:
    """Pairs of different splits that are the same, in order."""
    buckets: defaultdict[tuple[int, int], defaultdict[str, list[int]]] = defaultdict(
        lambda: defaultdict(list)
    )
    width = 64 // _BANDS
    for place, one in enumerate(prints):
        for band in range(_BANDS):
            bits = one.perceptual >> (band * width) & (1 << width) - 1
            buckets[band, bits][one.split].append(place)
    hashes = np.array([one.perceptual for one in prints], dtype=np.uint64)
    candidates: set[tuple[int, int]] = set()
    for members in buckets.values():
        for first, second in combinations(members.values(), 2):
            candidates.update(_close(hashes, first, second))
    for first_place, second_place in sorted(candidates):
        if _look_alike(prints[first_place], prints[second_place]):
            yield prints[first_place], prints[second_place]


def _close(hashes: np.ndarray, first: list[int], second: list[int]) -> Iterator[tuple[int, int]]:
    """Pairs whose hashes differ in few bits; the earlier place first."""
    others = np.array(second)
    for place in first:  # row by row: a bucket of flat pictures can be large
        distances = np.bitwise_count(hashes[place] ^ hashes[others])
        for other in others[distances <= LARGEST_DISTANCE].tolist():
            yield min(place, other), max(place, other)


def _look_alike(first: _Print, second: _Print) -> bool:
    difference = np.abs(first.thumbnail.astype(np.int16) - second.thumbnail.astype(np.int16))
    return float(difference.mean()) <= LARGEST_DIFFERENCE
