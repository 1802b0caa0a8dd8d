"""A linear probe of 20 epochs: the frozen part once, against a loop that runs it in every epoch.

    python benchmarks/linear_probe.py [--data FOLDER_OF_FASHION_MNIST] [--models resnet18,...] [--images 5000]

Prints, in one run on this machine: seconds of (a) a plain PyTorch loop that forwards each epoch (timed for
two epochs, scaled), (b) one forward pass over the same images, (c) tldist, (d) tldist again with another
learning rate; and the ratios. Start-up (imports, building the model, opening the data) is not counted in any.
The look for duplicate images, which the plain loop does not make, is off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import fashion_folder, machine
from torch import nn
from torch.utils.data import DataLoader
from torchvision import datasets, models
from torchvision.transforms import v2

from tldist import api

EPOCHS, SIZE, BATCH = 20, 96, 64


def plain_loop(data: Path, name: str, epochs: int) -> tuple[float, float]:
    """(seconds of an epoch of the loop, seconds of one forward pass over all images)."""
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(SIZE, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    train = DataLoader(datasets.ImageFolder(data / "train", transform), BATCH, shuffle=True, num_workers=1)
    val = DataLoader(datasets.ImageFolder(data / "val", transform), BATCH, num_workers=1)
    model = models.get_model(name, weights=None, num_classes=10)
    model.requires_grad_(False)
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    model.eval()
    per_epoch = []
    for _ in range(epochs):
        begin = time.perf_counter()
        for images, labels in train:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for images, _labels in val:
                model(images).argmax(1)
        per_epoch.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    with torch.no_grad():
        for loader in (train, val):
            for images, _labels in loader:
                model(images)
    return statistics.median(per_epoch), time.perf_counter() - begin


def tldist_run(data: Path, name: str, out: Path, cache: Path, lr: float) -> float:
    """Seconds of a run, start-up apart."""
    api.finetune(
        data=str(data), model=name, weights="none", out=out, train="head", epochs=EPOCHS, image_size=SIZE,
        batch_size=BATCH, precision="fp32", channels_last="true", cache={"folder": cache},
        augment={"crop": None, "flip": False}, optimizer={"lr": lr}, calibrate=False,
        guard={"duplicates": "off"},
    )  # fmt: skip
    return float(json.loads((out / "summary.json").read_text())["seconds"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder that holds FashionMNIST/raw")
    parser.add_argument("--models", default="mobilenet_v3_small,resnet18")
    parser.add_argument("--images", type=int, default=5000)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        data = fashion_folder(options.data, Path(folder) / "data", options.images)
        for name in options.models.split(","):
            epoch, forward = plain_loop(data, name, 2)
            first = tldist_run(data, name, Path(folder) / f"{name}-1", Path(folder) / "cache", 1e-3)
            second = tldist_run(data, name, Path(folder) / f"{name}-2", Path(folder) / "cache", 3e-3)
            loop = epoch * EPOCHS
            print(
                f"{name}: plain loop {loop:.1f} s, one forward pass {forward:.1f} s, tldist {first:.1f} s, "
                f"again {second:.2f} s | loop/tldist {loop / first:.1f}x, "
                f"tldist/forward {first / forward:.2f}, again/first {second / first:.3f}"
            )


if __name__ == "__main__":
    main()
