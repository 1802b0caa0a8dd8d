"""Every torchvision classifier exported to ONNX and compared with PyTorch: ``docs/export.md``.

    python benchmarks/export_table.py [--pattern resnet*] [--out docs/export.md] [--rows runs/export.jsonl]

For each: by which exporter, nodes, size, time, and how far ONNX Runtime's answers (logits and features, on
the CPU) are from PyTorch's, beside how far PyTorch's own float32 is from its float64. Random weights,
BatchNorm statistics of 19 images, heads that are not zero. Then one model of each family with height and
width free. Each model runs in a process of its own. An hour or two for all on one core, 16 GB of memory for
the largest; rows are kept as they come, and the next call goes on after them (remove the file of rows to
begin anew).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine
from torch import nn
from torchvision.models import get_model_weights

from tldist.errors import TldistError
from tldist.export.answers import answer
from tldist.export.converter import convert
from tldist.export.graph import ExportGraph
from tldist.export.groups import relative_error
from tldist.export.natural import extreme_images, natural_images
from tldist.export.onnx_file import save
from tldist.export.profile import find_profile
from tldist.models.heads import find_head
from tldist.models.load import input_tensor
from tldist.models.zoo import build_network, describe_network, list_architectures
from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.reference import SLACK, Samples
from tldist.runtime.session import open_session

SIZES = {"inception_v3": 299}
FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_x_400mf",
    "regnet_y_400mf", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "swin_v2_t", "vgg11", "vit_b_32", "wide_resnet50_2",
)  # fmt: skip
"""One model of each family: what is tried with height and width free."""
UPSTREAM = {
    "adaptive_avg_pool2d": "https://github.com/pytorch/pytorch/issues/147720",
    "SwinTransformer cannot": "https://github.com/microsoft/Swin-Transformer/issues/301",
    "Wrong image height": "by design: the position embedding has one size",
}
"""Where a reason that holds these words is known."""
_PICTURES = 4


def lively(name: str, size: int) -> nn.Module:
    """A model with random weights whose outputs depend on the image: else parity would be empty."""
    torch.manual_seed(0)
    model = build_network(describe_network(name, 1000), trust_code=False).eval()
    head = find_head(model)[1]
    if not head.weight.any():  # torchvision's vision transformers start with a head of zeros
        nn.init.normal_(head.weight, std=0.02)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over the images
        norm.train()
    if norms:
        # Noise is so strange to an EfficientNet that saw pictures alone that rounding errors are its answer.
        extremes = extreme_images(size, size, seed=7).values()
        images = np.concatenate([natural_images(12, size, size, seed=7), *extremes])
        with torch.no_grad():
            model(input_tensor(torch.from_numpy(images), Preprocessing(size, size, size)))
    return model.eval()


def pixels_of(name: str, free: bool) -> int:
    """Height and width that a model is exported at."""
    return 112 if free and not name.startswith(("vit_", "maxvit_")) else SIZES.get(name, 224)


def measure(name: str, free: bool, size: int) -> dict[str, Any]:
    """One row: figures, or ``reason`` where the model cannot be exported so."""
    graph = ExportGraph(
        lively(name, size),
        Preprocessing(size, size, size),
        ("logits", "features"),
        input="dynamic" if free else "fixed",
    ).eval()
    row: dict[str, Any] = {"model": name, "free": free, "pixels": size}
    row["parameters"] = sum(parameter.numel() for parameter in graph.parameters())
    begin = time.perf_counter()
    try:
        converted = convert(graph, None)
    except TldistError as error:
        return row | {"reason": str(error), "seconds": time.perf_counter() - begin}
    row |= {
        "seconds": time.perf_counter() - begin,
        "exporter": converted.exporter,
        "refused": [list(pair) for pair in converted.refused],
        "opset": converted.opset,
        "nodes": len(converted.proto.graph.node),
    }
    with tempfile.TemporaryDirectory() as folder:
        save(converted.proto, Path(folder) / "model.onnx", {})
        row["files"] = len(list(Path(folder).iterdir()))
        row["bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        del converted
        row |= compare(graph, Path(folder) / "model.onnx", size)
    row["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def compare(graph: ExportGraph, model: Path, size: int) -> dict[str, Any]:
    """The largest relative error of any output, PyTorch's own of that output, and the verdict."""
    images = np.concatenate([natural_images(_PICTURES, size, size), *extreme_images(size, size).values()])
    samples = Samples(images, (("all", len(images)),), tuple(map(str, range(len(images)))))
    reference = answer(graph, samples)
    found = open_session(model, threads=torch.get_num_threads()).run(images)
    errors, own = [], []
    for name, expected in reference.expected.items():
        magnitude = float(np.abs(expected).max())
        errors.append(relative_error(expected, found[name], magnitude))
        own.append(relative_error(reference.referee[name], expected, magnitude))
    tolerance = find_profile("cpu-fp32").tolerances.max_relative
    right = all(error <= max(tolerance, SLACK * mine) for error, mine in zip(errors, own))
    worst = int(np.argmax(errors))
    return {"error": errors[worst], "own": own[worst], "right": right}


def in_a_process(name: str, free: bool, minutes: float) -> dict[str, Any]:
    """A row, measured in a fresh process; one that is killed or does not end is a row too."""
    command = [sys.executable, __file__, "--one", name, *(["--free"] if free else [])]
    about = {"model": name, "free": free}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return about | {"not_run": f"did not end within {minutes:g} minutes on this machine"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["killed"])[-1]
        return about | {"not_run": f"the process ended with {done.returncode}: {last[:200]}"}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def memory_short(name: str) -> str:
    """Whether there is too little free memory for a model now, in words; empty: there is enough."""
    info = Path("/proc/meminfo")
    free = re.search(r"MemAvailable:\s+(\d+) kB", info.read_text()) if info.is_file() else None
    weights = get_model_weights(name).DEFAULT.meta["num_params"] * 4
    # weights in PyTorch, in the graph, twice in ONNX Runtime or once in float64, and what a pass needs
    needed = 5 * weights + 3e9
    if free is None or int(free[1]) * 1024 >= needed:
        return ""
    return f"{name}: left for later, {needed / 1e9:.0f} GB wanted, {int(free[1]) / 1e6:.0f} GB are free"


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    refused = "".join(f" ({name} refused: {reason})" for name, reason in row["refused"])
    cells = (
        row["model"],
        f"{row['parameters'] / 1e6:.1f} M",
        str(row["pixels"]),
        row["exporter"] + refused,
        str(row["opset"]),
        str(row["nodes"]),
        f"{row['bytes'] / 1e6:.1f}" + (f" in {row['files']} files" if row["files"] > 1 else ""),
        f"{row['error']:.1e}",
        f"{row['error'] / row['own']:.1f}" if row["own"] else "-",
        "yes" if row["right"] else "NO",
        f"{row['seconds']:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What was not exported, each with its reason, and where that is known upstream."""
    lines = []
    for row in rows:
        reason = row.get("reason") or row.get("not_run")
        if reason:
            known = [link for words, link in UPSTREAM.items() if words in reason]
            kind = "not run: " if "not_run" in row else ""
            lines.append(f"- `{row['model']}`: {kind}{reason}{''.join(f' ({link})' for link in known)}")
    return lines


HEADER = (
    "| model | parameters | pixels | exporter | opset | nodes | MB | error | of PyTorch's own | right | s |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


ABOUT = (
    "Random weights, BatchNorm statistics of 19 images, heads that are not zero, any batch size. *Error*: "
    "the largest difference between ONNX Runtime on the CPU and PyTorch on any logit or feature of "
    f"{_PICTURES} pictures, black, white and noise, relative to the largest value; *of PyTorch's own*: in "
    "multiples of the difference between PyTorch in float32 and in float64. *Right*: within the tolerance of "
    f"the profile `cpu-fp32`, or {SLACK:g} times PyTorch's own. *s*: export and its checks."
)
ABOUT_FREE = (
    "One model of each family. The graph is compared with PyTorch at six sizes, smaller and larger, odd, "
    "portrait and landscape; one that is right only at the size it was made with is refused."
)


def document(rows: list[dict[str, Any]], total: int) -> str:
    """The page."""
    fixed = [row for row in rows if not row["free"]]
    free = [row for row in rows if row["free"]]
    done = [row for row in fixed if "exporter" in row]
    left = f", {total - len(fixed)} not tried yet" if len(fixed) < total else ""
    parts = [
        "# Every torchvision classifier, exported",
        f"Made by `make table` ({machine()}): {len(done)} of {total} exported{left}. {ABOUT}",
        "\n".join([HEADER, *map(line, done)]),
    ]
    if failed := failures(fixed):
        parts += ["## What cannot be exported, or was not run here", "\n".join(failed)]
    if free:
        lines = [line(row) for row in free if "exporter" in row]
        parts += ["## Height and width free (`input=dynamic`)", ABOUT_FREE, "\n".join([HEADER, *lines])]
        if failed := failures(free):
            parts += ["These take images of one size only:", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pattern", default="*")
    parser.add_argument("--out", type=Path, default=Path("docs/export.md"))
    parser.add_argument("--rows", type=Path, default=Path("runs/export.jsonl"))
    parser.add_argument("--minutes", type=float, default=60, help="that one model may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--free", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.free, pixels_of(options.one, options.free))))
        return
    names = list_architectures()
    wanted = [(name, False) for name in names] + [(name, True) for name in FAMILIES]
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    options.rows.touch()
    rows = [json.loads(text) for text in options.rows.read_text(encoding="utf-8").splitlines()]
    for name, free in wanted:
        if not fnmatch.fnmatchcase(name, options.pattern):
            continue
        known = {(row["model"], row["free"]) for row in rows}
        if (name, free) not in known and (short := memory_short(name)):
            print(short, flush=True)
        elif (name, free) not in known:
            rows.append(in_a_process(name, free, options.minutes))
            print(json.dumps(rows[-1]), flush=True)
            with options.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        ordered = sorted(rows, key=lambda row: wanted.index((row["model"], row["free"])))
        options.out.write_text(document(ordered, len(names)), encoding="utf-8")
    if any(not row.get("right", True) for row in rows):
        raise SystemExit("some models are not right: see NO in the table")


if __name__ == "__main__":
    main()
