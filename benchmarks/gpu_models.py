"""What gpu.sh needs of Python: a bundle of a zoo model, and Markdown rows from the figures of the commands.

python benchmarks/gpu_models.py bundle resnet50 OUT      pre-trained weights, or random ones without a network
python benchmarks/gpu_models.py rows MODEL PROFILE EXPORT.json BENCH.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from tldist.errors import TldistError
from tldist.export.natural import natural_images
from tldist.models.heads import find_head
from tldist.models.load import Start, input_tensor, save_bundle, start_model
from tldist.models.weights import find_weights


def bundle(name: str, out: Path) -> None:
    """Write a bundle with the thousand classes of ImageNet."""
    try:
        found = find_weights(name, "default")
        classes = found.classes if found else ()
        start = start_model(name, "default", classes)
        print(f"{name}: pre-trained weights")
    except (TldistError, OSError) as error:
        print(f"{name}: random weights ({error})")
        start = start_model(name, "none", tuple(f"class {number:03d}" for number in range(1000)))
        randomise(start)
    save_bundle(out, start.model.eval(), start.config)


def randomise(start: Start) -> None:
    """Statistics for batch normalisation and a head that is not zero, so that outputs depend on the image."""
    torch.manual_seed(0)
    nn.init.normal_(find_head(start.model)[1].weight, std=0.02)
    for module in start.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
    how = start.config.preprocessing
    images = torch.from_numpy(natural_images(16, how.height, how.width))
    with torch.no_grad():
        start.model.train()(input_tensor(images, how))


def rows(model: str, profile: str, export: Path, bench: Path) -> None:
    """A row for each variant and batch size."""
    parity = last_json(export)
    outputs = parity.get("outputs") or [{}]
    error = outputs[0].get("max_relative")
    words = (
        f"{parity.get('parity', '?')}, error {error:.1e}" if error is not None else parity.get("parity", "?")
    )
    for row in last_json(bench).get("rows", []):
        head = f"| {model} | {profile} | {row['batch']} | {row['variant']} |"
        if row["failed"]:
            print(f"{head} did not run: {row['failed']} | | | | |")
            continue
        wrong = " WRONG RESULT" if row["wrong"] else ""
        own = words if row["variant"] == "onnxruntime" else ""
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else "-"
        print(
            f"{head} {row['median_ms']:.2f}{wrong} | {row['p99_ms']:.2f} | {row['images_per_second']:.0f} | "
            f"{ratio} | {own} |"
        )


def last_json(path: Path) -> dict[str, object]:
    """The verdict that a command printed as its last line; empty where it printed none."""
    for line in reversed(path.read_text(encoding="utf-8").splitlines()):
        if line.startswith("{"):
            values: dict[str, object] = json.loads(line)
            return values
    return {}


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "bundle":
        bundle(arguments[0], Path(arguments[1]))
    else:
        rows(arguments[0], arguments[1], Path(arguments[2]), Path(arguments[3]))
