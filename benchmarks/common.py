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
    labels_file = source / "FashionMNIST/raw/train-labels-idx1-ubyte.gz" if source else None
    if labels_file is not None and labels_file.is_file():
        labels = np.frombuffer(gzip.decompress(labels_file.read_bytes())[8:], np.uint8)[:images]
        raw = gzip.decompress((labels_file.parent / "train-images-idx3-ubyte.gz").read_bytes())[16:]
        pixels = np.frombuffer(raw, np.uint8).reshape(-1, 28, 28)[:images]
    else:
        random = np.random.default_rng(0)
        labels = random.integers(0, 10, images)
        pixels = random.integers(0, 255, (images, 28, 28), dtype=np.uint8)
    for number, (label, picture) in enumerate(zip(labels, pixels)):
        split = "val" if number % 5 == 0 else "train"
        folder = target / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).convert("RGB").save(folder / f"{number}.png")
    return target
