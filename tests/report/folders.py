"""Run folders made by hand, in the formats that the stages write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tldist.files import write_json


def measurement(classes: list[str], random: np.random.Generator) -> dict[str, Any]:
    """A measurement as `tldist evaluate` writes it, with random counts."""
    counts = random.integers(0, 30, (len(classes), len(classes)))
    total = int(counts.sum())
    return {
        "accuracy": float(np.trace(counts) / total),
        "loss": float(random.random()),
        "count": total,
        "broken": 0,
        "per_class": {},
        "classes": classes,
        "confusion": counts.tolist(),
    }


def write_finetune(folder: Path, classes: list[str], steps: int = 12, seed: int = 0) -> dict[str, Any]:
    """A fine-tuning run; returns its summary."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "epoch": 1, "samples": step, "loss": 1 / step, "lr": 1e-3 / step})
        if step % 4 == 0:
            values = {"val_accuracy": step / steps, "val_loss": 2 / step}
            lines.append({"step": step, "epoch": step // 4, **values})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = {
        "stage": "finetune",
        "status": "done",
        "tldist": "0.1.0",
        "host": "<host>",
        "steps": steps,
        "selected_step": 8,
        "seconds": 58.01,
        "frozen": {"tensors": 60, "before": "ab" * 32, "after": "ab" * 32, "equal": True},
        "validation": measurement(classes, random),
    }
    write_json(folder / "summary.json", summary)
    (folder / "recipe.yaml").write_text("data:\n  path: <photos> & more\nmodel: resnet18\n")
    return summary


def write_fusion(folder: Path, parents: list[str], classes: list[str]) -> dict[str, Any]:
    """A fusion run; returns its summary."""
    random = np.random.default_rng(1)
    folder.mkdir(parents=True)
    summary = {
        "stage": "fuse",
        "status": "done",
        "method": "average",
        "before": {parent: measurement(classes, random) for parent in parents},
        "merged": None,
        "after": measurement(classes, random),
    }
    write_json(folder / "summary.json", summary)
    return summary


def write_package_folder(folder: Path, classes: list[str], verdict: str = "PASS") -> dict[str, Any]:
    """A package without its graph; returns its parity report."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(2)
    values = random.normal(size=200)
    group = {"name": "real", "rows": 48, "max_relative": 6.3e-07, "tolerance": 5e-05, "own_error": 3.9e-07}
    parity = {
        "format": "tldist.parity/1",
        "parity": verdict,
        "provider": "CPUExecutionProvider",
        "batches": [1, 2, 7],
        "samples": {"real": 16, "black": 1},
        "problems": [] if verdict == "PASS" else ["the graph is <b>not</b> the one recorded"],
        "outputs": [
            {
                "output": "logits",
                "rows": 51,
                "groups": [{**group, "cosine": 0.9999991, "magnitude": 3.0}],
                "max_absolute": 7.25e-06,
                "mean_absolute": 1.77e-06,
                "max_relative": 1.21e-06,
                "tolerance": 5e-05,
                "cosine": 0.9999987,
                "top1": 1.0,
                "flips": [],
                "faults": [],
                "warnings": ["values hardly <i>depend</i> on the image"],
                "pairs": np.stack([values, values + 1e-6 * random.normal(size=200)], 1).tolist(),
            }
        ],
    }
    write_json(folder / "parity.json", parity)
    package = {
        "format": "tldist.package/1",
        "classes": classes,
        "preprocessing": {
            "height": 32,
            "width": 40,
            "resize": 36,
            "interpolation": "bilinear",
            "mean": [0.5, 0.5, 0.5],
            "std": [0.2, 0.2, 0.2],
        },
        "outputs": {"logits": len(classes)},
        "profile": {"name": "cpu-fp32", "precision": "fp32", "provider": "CPUExecutionProvider"},
        "bundle": {"identity": "cd" * 32, "weights": "ef" * 32},
        "lineage": {"recipe": {"bundle": "<somewhere>"}},
        "files": {"model.onnx": "00" * 32},
        "versions": {"tldist": "0.1.0"},
    }
    write_json(folder / "package.json", package)
    return parity
