"""MNIST -> USPS and back: each way to adapt, chosen without labels of the target, and the regret of that.

    python benchmarks/adaptation.py --data FOLDER_WITH_MNIST_USPS --out RUNS [--seeds 3] [--limit N]

Network and preprocessing are those of skada-bench (``ShallowConvNet``; USPS padded to 28 pixels; each domain
with its own mean and deviation), and so is the split: four fifths of both training sets, the last fifth of
the target is measured on. Its Adadelta is AdamW here, and no weight of a loss is searched for. Runs that are
finished are not made again; one that was stopped goes on.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import machine
from digit_net import MEAN, SCALE, STD
from fusion import read_mnist, read_usps
from PIL import Image

from tldist import api
from tldist.features.ranks import complete_scores, mean_ranks
from tldist.features.scorers.candidate import SCORERS
from tldist.files import atomic_file

METHODS = ("deep_coral", "dan", "dann", "cdan", "mcd", "mcc", "bnm", "shot")
USPS_MEAN, USPS_STD = 0.0806, 0.2063
DIRECTIONS = {"M->U": ("mnist", "usps"), "U->M": ("usps", "mnist")}
NAMES = ("source_only", "mcc", "deep_coral", "dann", "dan", "target_only")
PUBLISHED = {
    "M->U": dict(zip(NAMES, (94.2, 98.2, 97.1, 92.6, 95.0, 98.1))),
    "U->M": dict(zip(NAMES, (73.4, 90.4, 89.9, 86.8, 86.3, 98.9))),
}
"""skada-bench's stored results, its weights chosen with labels of the target (accuracy in per cent)."""


def write_domain(data: Path, out: Path, name: str, role: str, seed: int, limit: int | None) -> Path:
    """One Parquet file: a fifth is test; of a source a tenth is val, of a target all the rest is train."""
    file = out / f"{name}-{role}.parquet"
    if file.is_file():
        return file
    if name == "mnist":
        pixels, labels = read_mnist(data, "MNIST", "train")
        grey = pixels / 255.0
    else:
        small, labels = read_usps(data, "")
        grey = np.pad(small / 255.0, ((0, 0), (6, 6), (6, 6)))
        grey = np.clip((grey - USPS_MEAN) / USPS_STD * STD + MEAN, 0, 1 / SCALE)
    order = np.random.default_rng([seed, len(name)]).permutation(len(labels))[:limit]
    tests, held = len(order) // 5, len(order) // 10 if role == "source" else 0
    splits = ["test"] * tests + ["val"] * held + ["train"] * (len(order) - tests - held)
    images = [_encode(grey[index]) for index in order]
    names = [str(labels[index]) for index in order]
    out.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as temporary:
        table = pa.table({"image": images, "label": names, "split": splits})
        pq.write_table(table, temporary, row_group_size=500)
    return file


def _encode(grey: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((grey * SCALE * 255).round().astype(np.uint8)).convert("RGB").save(buffer, "png")
    return buffer.getvalue()


def settings(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """What all runs share."""
    return {
        "model": "digit_net:shallow_conv_net", "weights": "none", "image_size": 28, "seed": seed,
        "epochs": options.epochs, "batch_size": 256, "precision": "fp32", "channels_last": "false",
        "optimizer": {"lr": 1e-3, "weight_decay": 1e-2}, "augment": {"crop": None, "flip": False},
        "cache": "off", "calibrate": False, "track": None, "guard": {"duplicates": "off", "probe": "off"},
        "workers": 0, "checkpoint": {"keep": 1},
    }  # fmt: skip


def rows(options: argparse.Namespace, seed: int, direction: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Each line of the table, for one seed: accuracy on the target's test images, and regret."""
    folder = options.out / f"seed-{seed}"
    source, target = (
        write_domain(options.data, folder, name, role, seed, options.limit)
        for name, role in zip(DIRECTIONS[direction], ("source", "target"))
    )
    common, runs = settings(options, seed), folder / direction.replace("->", "-")
    plain = api.finetune(data=source, out=runs / "source_only", **common).out
    found: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        api.finetune(
            data=source, out=runs / method,
            adapt={"method": method, "target": {"path": str(target)}, "source_only": plain}, **common,
        )  # fmt: skip
        found[method] = json.loads((runs / method / "summary.json").read_text())["adaptation"]
        tests = {row["name"]: row["test"] for row in found[method]["candidates"]}
        if method == options.methods[0]:
            yield "source_only", {"accuracy": tests["source_only"], "regret": 0.0}
        yield method, {"accuracy": tests[found[method]["chosen"]], "regret": found[method]["regret"]}
    yield "chosen among all", _among_all(found)
    best = max(row["test"] for told in found.values() for row in told["candidates"])
    yield "oracle", {"accuracy": best, "regret": 0.0}
    api.finetune(data=target, out=runs / "target_only", **common)
    measured = api.evaluate(model=runs / "target_only", data=target, trust_code=True, workers=0)
    yield "target_only", {"accuracy": float(measured.values["accuracy"]), "regret": 0.0}


def _among_all(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The best mean rank of what each method chose: no label has a say in it."""
    chosen = {
        method: next(row for row in told["candidates"] if row["name"] == told["chosen"])
        for method, told in found.items()
    }
    kept, _ = complete_scores({method: row["scores"] for method, row in chosen.items()}, tuple(SCORERS))
    signed = {
        name: {method: value if SCORERS[name].larger else -value for method, value in values.items()}
        for name, values in kept.items()
    }
    ranks = mean_ranks(signed, {name: SCORERS[name].weight for name in kept})
    best = min(ranks, key=lambda method: ranks[method])
    return {
        "accuracy": chosen[best]["test"],
        "regret": max(row["test"] for row in chosen.values()) - chosen[best]["test"],
    }


def show(table: dict[str, dict[str, list[dict[str, float]]]], write: Callable[[str], object] = print) -> None:
    """As Markdown; accuracies in per cent, mean and standard error over the seeds."""
    write(f"{machine()}\n")
    write(
        "| chosen without target labels | " + " | ".join(f"{d} | regret | skada-bench" for d in table) + " |"
    )
    write("| --- |" + " --- | --- | --- |" * len(table))
    for name in next(iter(table.values())):
        cells = []
        for direction, lines in table.items():
            accuracies = 100 * np.array([line["accuracy"] for line in lines[name]])
            regret = 100 * np.mean([line["regret"] for line in lines[name]])
            error = accuracies.std(ddof=1) / len(accuracies) ** 0.5 if len(accuracies) > 1 else 0.0
            published = PUBLISHED[direction].get(name, "")
            cells.append(f"{accuracies.mean():.1f} ± {error:.1f} | {regret:.1f} | {published}")
        write(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--limit", type=int, help="images of each domain; none: all")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--directions", nargs="+", default=tuple(DIRECTIONS), choices=DIRECTIONS)
    options = parser.parse_args()
    table: dict[str, dict[str, list[dict[str, float]]]] = {direction: {} for direction in options.directions}
    for seed in range(options.seeds):
        for direction in options.directions:
            for name, line in rows(options, seed, direction):
                table[direction].setdefault(name, []).append(line)
                print(f"seed {seed} {direction} {name}: {line}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "table.json").write_text(json.dumps(table, indent=2))
    show(table)


if __name__ == "__main__":
    main()
