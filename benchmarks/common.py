"""What the benchmarks share: the data that they run on, and a line about the machine."""

from __future__ import annotations

import gzip
import os
import platform
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def machine() -> str:
    """One line: processor, cores, versions, threads."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = names[0] if names else name
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}"


def fashion_folder(source: Path | None, target: Path, images: int) -> Path:
    """Write pictures into ``target/{train,val}/CLASS``: Fashion-MNIST, or noise where it is not there.

    Four fifths are for training. Noise of the same size costs the same time; accuracies mean nothing then.
    """
    if source is not None and (source / "FashionMNIST").is_dir():
        pixels, labels = _fashion(source, "train")
    else:
        random = np.random.default_rng(0)
        labels = random.integers(0, 10, images)
        pixels = random.integers(0, 255, (images, 28, 28), dtype=np.uint8)
    for number, (label, picture) in enumerate(zip(labels[:images], pixels[:images])):
        _save(picture, target / ("val" if number % 5 == 0 else "train") / f"class{label}" / f"{number}.png")
    return target


def fashion_splits(source: Path, target: Path, train: int, val: int) -> Path:
    """Write the first images of Fashion-MNIST's train and test sets into ``target/{train,val}/CLASS``."""
    for split, name, count in (("train", "train", train), ("val", "t10k", val)):
        pixels, labels = _fashion(source, name)
        for number in range(count):
            _save(pixels[number], target / split / f"class{labels[number]}" / f"{number}.png")
    return target


def noise_jpegs(target: Path, images: int, size: tuple[int, int], distinct: int = 160) -> Path:
    """Write smooth random JPEGs of about (width, height) into ``target/{train,val}/{a,b}``.

    Coarse noise enlarged, and fine noise upon it: about as many bytes a pixel as a photo. After ``distinct``
    ones they repeat, as links.
    """
    random = np.random.default_rng(0)
    files: list[Path] = []
    for number in range(images):
        split = "val" if number % 10 == 0 else "train"
        files.append(target / split / "ab"[number % 2] / f"{number}.jpg")
        if number >= distinct:
            files[-1].symlink_to(files[number % distinct].resolve())
            continue
        width, height = (int(side * random.uniform(0.9, 1.1)) for side in size)
        coarse = Image.fromarray(random.integers(0, 255, (height // 40, width // 40, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32)
        picture += random.normal(0, 4, picture.shape)
        _save(np.clip(picture, 0, 255).astype(np.uint8), files[-1])
    return target


def _fashion(source: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, 28, 28) and labels (N,)."""
    raw = source / "FashionMNIST/raw"
    pixels = gzip.decompress((raw / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((raw / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8)


def _save(picture: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).convert("RGB").save(file, quality=90)
