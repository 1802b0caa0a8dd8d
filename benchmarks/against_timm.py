"""tldist's finetune against timm's train.py: quality (the same settings, paired seeds) and speed.

    python benchmarks/against_timm.py quality --timm-train train.py --data FOLDER [--seeds 5]
    python benchmarks/against_timm.py speed --timm-train train.py [--rounds 3]

``train.py`` is the script of timm's repository; FOLDER holds ``photos``, ``models/mobilenet_v2.safetensors``
and ``FashionMNIST/raw``. Both sides start from the same weights, the head's included; timm trains timm's own
model of the same architecture. Runs that are in ``--results`` already are not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import timm
import torch
from common import fashion_splits, machine, noise_jpegs
from safetensors.torch import save_file

from tldist.bundle import read_bundle
from tldist.models.load import save_bundle, start_model


@dataclass(frozen=True)
class Task:
    """What both sides do.

    Attributes:
        data: class folders under train and val.
        model, timm_model: names of the same architecture.
        weights: where both start.
        size: pixels of the square input.
        epochs, batch, lr, decay: of AdamW under a cosine to 0, without warm-up.
        flip: mirror half of the images.
    """

    data: Path
    model: str
    timm_model: str
    weights: str
    size: int
    epochs: int
    batch: int
    lr: float = 5e-4
    decay: float = 0.05
    flip: bool = True


def start_together(task: Task, seed: int, folder: Path) -> tuple[Path, Path, int]:
    """The same start twice: a bundle for tldist, a file for timm; and the resize before the crop."""
    classes = tuple(sorted(path.name for path in (task.data / "train").iterdir()))
    torch.manual_seed(seed)
    start = start_model(task.model, task.weights, classes, image_size=task.size)
    bundle, file = folder / "bundle", folder / "timm.safetensors"
    save_bundle(bundle, start.model, start.config)
    theirs = timm.create_model(task.timm_model, num_classes=len(classes)).state_dict()
    ours = start.model.state_dict().values()  # the same layers in the same order, under other names
    save_file({n: o.reshape(t.shape).clone() for (n, t), o in zip(theirs.items(), ours, strict=True)}, file)
    return bundle, file, read_bundle(bundle)[1].preprocessing.resize


def tldist_run(task: Task, seed: int, bundle: Path, out: Path, *settings: str) -> tuple[float, float]:
    """(accuracy of the last epoch, images/s of the last epoch, evaluation apart)."""
    command = [
        sys.executable, "-m", "tldist", "finetune", f"data={task.data}", f"model={bundle}", f"out={out}",
        f"seed={seed}", f"epochs={task.epochs}", f"batch_size={task.batch}", "select=last",
        f"optimizer.lr={task.lr}", f"optimizer.weight_decay={task.decay}", "optimizer.warmup=0",
        f"augment.flip={str(task.flip).lower()}", "checkpoint.keep=1", "calibrate=false", *settings,
    ]  # fmt: skip
    run(command)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if line.get("epoch") == task.epochs and "lr" in line]
    found = json.loads((out / "summary.json").read_text())
    return found["validation"]["accuracy"], statistics.harmonic_mean(rates)


def timm_run(
    script: Path, task: Task, seed: int, file: Path, out: Path, *options: str
) -> tuple[float, float]:
    """The same of timm's script."""
    command = [
        sys.executable, script, "--data-dir", task.data, "--train-split", "train", "--val-split", "val",
        "--model", task.timm_model, "--num-classes", len(list((task.data / "train").iterdir())),
        "--initial-checkpoint", file, "--device", "cpu", "--seed", seed, "--epochs", task.epochs,
        "-b", task.batch, "--opt", "adamw", "--lr", task.lr, "--weight-decay", task.decay,
        "--sched-on-updates", "--warmup-epochs", 0, "--min-lr", 0, "--hflip", 0.5 if task.flip else 0.0,
        "--input-size", 3, task.size, task.size, "--output", out, "--experiment", "run", "--log-interval", 1,
        *options,
    ]  # fmt: skip
    text = run([str(part) for part in command])
    with (out / "run" / "summary.csv").open() as rows:
        accuracy = float(list(csv.DictReader(rows))[-1]["eval_top1"]) / 100
    # The last line of training has the mean of its epoch: "Time: 0.512s, 62.5/s (0.530s, 60.4/s)".
    return accuracy, float(re.findall(r"Train: .*?/s +\([\d.]+s, +([\d.]+)/s\)", text)[-1])


def same_settings(task: Task, resize: int) -> list[str]:
    """What makes timm do what tldist does by default: crop, interpolation, dropout; and nothing else."""
    options = [
        "--scale", 0.35, 1.0, "--ratio", 0.75, 1.3333, "--color-jitter", 0, "--smoothing", 0,
        "--train-interpolation", "bilinear", "--interpolation", "bilinear",
        "--crop-pct", task.size / (resize + 0.5), "--mean", 0.485, 0.456, 0.406, "--std", 0.229, 0.224, 0.225,
        "--channels-last",
        "--drop", 0.2,  # torchvision's MobileNets have it before the head
    ]  # fmt: skip
    return [str(option) for option in options]


def run(command: list[str]) -> str:
    """Its output; an error shows the end of it."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}")
    return done.stdout


def quality(options: argparse.Namespace) -> None:
    """Accuracy of the last epoch, seed by seed, and the mean difference with its standard error."""
    weights = str(options.data / "models/mobilenet_v2.safetensors")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tasks = {
            "photos": lambda: Task(
                options.data / "photos", "mobilenet_v2", "mobilenetv2_100", weights, 224, 8, 16
            ),
            "fashion": lambda: Task(
                fashion_splits(options.data, folder / "fashion", 5000, 2000),
                "mobilenet_v2", "mobilenetv2_100", weights, 96, 5, 50, 1e-3,
            ),
        }  # fmt: skip
        for name in options.tasks.split(","):
            task = tasks[name]()
            for seed in range(options.seeds):
                here = folder / f"{name}-{seed}"
                here.mkdir()
                for side in ("tldist", "timm"):
                    if (name, seed, side) in dict(stored(options.results)):
                        continue
                    bundle, file, resize = start_together(task, seed, here)
                    if side == "tldist":
                        settings = ("precision=fp32", "channels_last=true")
                        found = tldist_run(task, seed, bundle, here / "tldist", *settings)
                    else:
                        same = same_settings(task, resize)
                        found = timm_run(options.timm_train, task, seed, file, here / "timm", *same)
                    record = {"task": name, "seed": seed, "side": side, "accuracy": found[0]}
                    with options.results.open("a") as file_:
                        file_.write(json.dumps(record) + "\n")
                    print(record, flush=True)
            found = dict(stored(options.results))
            seeds = [seed for seed in range(options.seeds) if (name, seed, "timm") in found]
            pairs = np.array([[found[name, seed, side] for side in ("tldist", "timm")] for seed in seeds])
            differences = pairs[:, 0] - pairs[:, 1]
            error = differences.std(ddof=1) / len(differences) ** 0.5
            print(
                f"{name}: tldist {pairs[:, 0].mean():.4f}, timm {pairs[:, 1].mean():.4f}, difference "
                f"{differences.mean():+.4f}, standard error {error:.4f}, {len(pairs)} seeds",
                flush=True,
            )


def stored(results: Path) -> Iterator[tuple[tuple[str, int, str], float]]:
    """What was measured before."""
    for line in results.read_text().splitlines() if results.is_file() else []:
        record = json.loads(line)
        yield (record["task"], record["seed"], record["side"]), record["accuracy"]


def speed(options: argparse.Namespace) -> None:
    """Images/s of training on JPEGs of about 1500x1000, the two taking turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = noise_jpegs(folder / "data", 1280, (1500, 1000))
        task = Task(data, "mobilenet_v3_small", "mobilenetv3_small_100", "none", 224, 2, 32)
        bundle, file, resize = start_together(task, 0, folder)
        same = same_settings(task, resize)
        settings = ("precision=fp32", "channels_last=true")
        variants = {"same settings": (settings, same), "both at their defaults": ((), [])}
        for name, (ours, theirs) in variants.items():
            ratios, rates = [], []
            for turn in range(options.rounds):
                mine = tldist_run(task, turn, bundle, folder / f"tldist-{name}-{turn}", *ours)[1]
                timms = timm_run(
                    options.timm_train, task, turn, file, folder / f"timm-{name}-{turn}", *theirs
                )[1]
                ratios.append(mine / timms)
                rates.append((mine, timms))
                print(f"  {name}: tldist {mine:.1f} img/s, timm {timms:.1f} img/s", flush=True)
            print(
                f"{name}: tldist {statistics.median(r for r, _ in rates):.1f} img/s, timm "
                f"{statistics.median(r for _, r in rates):.1f} img/s, ratio {statistics.median(ratios):.2f} "
                f"(median of {len(ratios)})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("quality", "speed"))
    parser.add_argument("--timm-train", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", default="photos,fashion")
    parser.add_argument("--results", type=Path, default=Path("runs/against_timm.jsonl"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(machine(), f"timm {timm.__version__}")
    options.results.parent.mkdir(parents=True, exist_ok=True)
    (quality if options.what == "quality" else speed)(options)


if __name__ == "__main__":
    main()
