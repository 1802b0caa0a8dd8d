"""Three source domains and a target: each single model, each fusion method, fused and then fine-tuned.

    python benchmarks/fusion.py --data FOLDER_WITH_MNIST_USPS_FASHIONMNIST --out RUNS

A ResNet-18 at 32 pixels learns clothes (Fashion-MNIST): the base, whose classes are others. From it three
models are fine-tuned on digits: handwritten (MNIST), printed (those of ``tldist demo``), and handwritten ones
that lie on pictures of clothes. The target is USPS: 1,000 images whose labels no fusion reads, 10 labelled
ones of each digit for the rows that say so, 1,000 to measure on. Runs that are finished are not made again.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import machine
from PIL import Image

from tldist import api
from tldist.demo.domains import STYLES, write_source

SOURCES = ("mnist", "printed", "clutter")
EACH, CLOTHES = 5000, 20000
STATISTICS, TESTS = 1000, 1000
LABELLED = 10
EPOCHS = {"base": 2, "source": 2, "few": 12, "distill": 4}
RATES = {"base": 1e-3, "source": 5e-4, "few": 3e-4}
QUIET = {"workers": 0, "precision": "fp32", "checkpoint": {"keep": 1}, "calibrate": False}


def read_mnist(folder: Path, name: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, 28, 28) and labels (N,)."""
    raw = folder / name / "raw"
    pixels = gzip.decompress((raw / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((raw / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    return np.frombuffer(pixels, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8)


def read_usps(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, 16, 16) and labels (N,)."""
    file = next((folder / "USPS").glob(f"*{name}*.bz2" if name == "t" else "usps.bz2"))
    pixels, labels = [], []
    for line in bz2.decompress(file.read_bytes()).decode().splitlines():
        label, *pairs = line.split()
        labels.append(int(float(label)) - 1)
        pixels.append([float(pair.partition(":")[2]) for pair in pairs])
    scaled = ((np.array(pixels) + 1) / 2 * 255).round().astype(np.uint8)
    return scaled.reshape(-1, 16, 16), np.array(labels)


def save(pictures: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write ``folder/LABEL/NUMBER.png``."""
    for number, (picture, label) in enumerate(zip(pictures, labels)):
        file = folder / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).convert("RGB").save(file)


def write_domains(data: Path, out: Path, seed: int) -> dict[str, Path]:
    """Write base, sources and target of one seed; other images for other seeds."""
    folders = {name: out / "domains" / name for name in ("fashion", *SOURCES, "target", "few")}
    if (out / "domains" / "done").is_file():
        return folders
    shutil.rmtree(out / "domains", ignore_errors=True)
    random = np.random.default_rng(seed)
    clothes, kinds = read_mnist(data, "FashionMNIST", "train")
    digits, labels = read_mnist(data, "MNIST", "train")
    order = random.permutation(len(digits))
    first, second = order[:EACH], order[EACH : 2 * EACH]
    behind = clothes[random.permutation(len(clothes))[:EACH]]
    on_clothes = np.maximum(digits[second], (behind * 0.6).astype(np.uint8))
    _split(clothes[:CLOTHES], kinds[:CLOTHES], folders["fashion"])
    _split(digits[first], labels[first], folders["mnist"])
    _split(on_clothes, labels[second], folders["clutter"])
    for style in STYLES:
        part = write_source(out / "domains" / style, style, 150, seed)
        for file in part.glob("*/*/*.png"):
            copy = folders["printed"] / file.parts[-3] / file.parts[-2] / f"{style}-{file.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    pixels, names = read_usps(data, "")
    order = random.permutation(len(pixels))
    few = np.concatenate([order[names[order] == digit][:LABELLED] for digit in range(10)])
    rest = np.setdiff1d(order, few)[:STATISTICS]
    tests = read_usps(data, "t")
    save(pixels[rest], names[rest], folders["target"] / "train")
    save(pixels[few], names[few], folders["target"] / "val")
    save(pixels[few], names[few], folders["few"] / "train")
    for name in ("target", "few"):
        save(tests[0][:TESTS], tests[1][:TESTS], folders[name] / "test")
    (out / "domains" / "done").touch()
    return folders


def _split(pictures: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    held = len(pictures) // 10
    save(pictures[held:], labels[held:], folder / "train")
    save(pictures[:held], labels[:held], folder / "val")


def train(domain: Path, model: str | Path, out: Path, seed: int, kind: str, **more: Any) -> Path:
    """Fine-tune all layers, without flips."""
    rest = {"validation": 0} if kind == "few" else {}
    api.finetune(
        data=domain, model=model, out=out, seed=seed, train="all", epochs=EPOCHS[kind], **QUIET,
        batch_size=10 if kind == "few" else 64, augment={"flip": False, "crop": (0.6, 1.0)},
        optimizer={"lr": RATES[kind]}, **rest, **more,
    )  # fmt: skip
    return out


def accuracy(model: Path, target: Path) -> float:
    """On the test images."""
    found = api.evaluate(model=model, data={"path": str(target), "split": "test"}, workers=0)
    return float(found.values["accuracy"])


def rows(data: Path, out: Path, seed: int) -> Iterator[tuple[str, float]]:
    """Each line of the table, for one seed."""
    folders = write_domains(data, out, seed)
    base = train(folders["fashion"], "resnet18", out / "base", seed, "base", weights="none", image_size=32)
    single = [train(folders[name], base, out / name, seed, "source") for name in SOURCES]
    target, few = folders["target"], folders["few"]
    yield (
        "base fine-tuned on 100 labelled images",
        accuracy(train(few, base, out / "few", seed, "few"), target),
    )
    for name, model in zip(SOURCES, single):
        yield f"{name}: as it is", accuracy(model, target)
    for name, model in zip(SOURCES, single):
        yield f"{name}: BatchNorm on the target", _fuse([model], "average", target, out / f"bn-{name}", seed)
    for name, settings in methods(base, few).items():
        label, method, bundles = settings.pop("label", name), settings.pop("method", name), single
        if method == "slerp":
            bundles = single[:2]
        yield label, _fuse(bundles, method, settings.pop("data", target), out / name, seed, **settings)
    best = max(single, key=lambda model: accuracy_of(model, target, "val"))
    for name, model in (("best source", best), ("average", out / "average"), ("search", out / "search")):
        tuned = train(few, model, out / f"tuned-{name}", seed, "few")
        yield f"{name}, then fine-tuned on 100 labelled images", accuracy(tuned, target)


def accuracy_of(model: Path, data: Path, split: str) -> float:
    """On another split."""
    found = api.evaluate(model=model, data={"path": str(data), "split": split}, workers=0)
    return float(found.values["accuracy"])


def _fuse(bundles: list[Path], method: str, data: Path, out: Path, seed: int, **more: Any) -> float:
    found = api.fuse(bundles=bundles, method=method, data=data, out=out, seed=seed, workers=0, **more)
    return float(found.values["accuracy"])


def methods(base: Path, few: Path) -> dict[str, dict[str, Any]]:
    """Every method at its defaults; what reads the 100 labels says so."""
    vectors = ("wise_ft", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "model_stock")
    student = {
        "epochs": EPOCHS["distill"],
        "augment": {"flip": False, "crop": (0.6, 1.0)},
        "labels_share": 0.0,
    }
    return {
        "average": {},
        "pooled": {"method": "average", "statistics": "pooled", "label": "average, statistics pooled"},
        "multi_slerp": {},
        "slerp": {"label": "slerp (of mnist and printed)"},
        **{name: {"base": base} for name in vectors},
        "fisher": {},
        "regmean": {},
        "rebasin": {},
        "adamerging": {"base": base, "adamerging": {"steps": 100, "lr": 1e-2}},
        "ensemble": {},
        "distill": {"distill": {**student, "precision": "fp32"}},
        "greedy_soup": {"label": "greedy_soup (chosen on 100 labels)"},
        "search": {"base": base, "label": "search (chosen on 100 labels)"},
        "stacking": {
            "method": "ensemble",
            "ensemble": "stacking",
            "label": "ensemble, stacking (100 labels)",
        },
        "concat": {"data": few, "label": "concat (head on 100 labels)"},
    }


def collect(data: Path, out: Path, seeds: int) -> dict[str, list[float]]:
    """Accuracies by line, one a seed."""
    table: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, value in rows(data, out / f"seed-{seed}", seed):
            table.setdefault(name, []).append(value)
            print(f"seed {seed}: {name}: {value:.4f}", flush=True)
    return table


def show(table: dict[str, list[float]], write: Callable[[str], object] = print) -> None:
    """As Markdown."""
    write(f"{machine()}\n")
    write("| model | accuracy on USPS | standard deviation |")
    write("| --- | --- | --- |")
    for name, values in table.items():
        write(f"| {name} | {np.mean(values):.3f} | {np.std(values, ddof=1) if len(values) > 1 else 0:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    table = collect(options.data, options.out, options.seeds)
    (options.out / "table.json").write_text(json.dumps(table, indent=2))
    show(table)


if __name__ == "__main__":
    main()
