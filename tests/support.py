"""Small real data for tests: images whose class can be learned, written to disk."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[1]


def class_image(label: int, random: np.random.Generator, size: tuple[int, int] = (40, 36)) -> np.ndarray:
    """A noisy picture with a bright bar whose place and colour depend on the class: uint8 (H, W, 3)."""
    width, height = size
    picture = random.integers(0, 90, (height, width, 3), dtype=np.uint8)
    place = (label * 7 + int(random.integers(0, 3))) % max(1, width - 8)
    picture[:, place : place + 8, label % 3] = 230
    return picture


def encode(picture: np.ndarray, fmt: str = "png") -> bytes:
    """Bytes of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, fmt.upper().replace("JPG", "JPEG"))
    return buffer.getvalue()


def make_images(
    folder: Path, classes: dict[str, int], size: tuple[int, int] = (40, 36), seed: int = 0, fmt: str = "png"
) -> Path:
    """Write ``classes[name]`` images of each class into ``folder/name``; returns the folder.

    What an image shows depends on the class's name alone, not on its position in the dictionary.
    """
    for name, count in classes.items():
        label = sum(name.encode()) % 4
        random = np.random.default_rng([seed, *name.encode()])
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (target / f"{number}.{fmt}").write_bytes(encode(class_image(label, random, size), fmt))
    return folder


def make_splits(folder: Path, train: dict[str, int], val: dict[str, int]) -> Path:
    """Write `make_images` of two splits, with other pictures in each, into ``folder/{train,val}``."""
    make_images(folder / "train", train)
    make_images(folder / "val", val, seed=1)
    return folder


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new process."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )


def run_tldist(*arguments: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python -m tldist`` as a person would, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "tldist", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=600,
        check=False,
    )
