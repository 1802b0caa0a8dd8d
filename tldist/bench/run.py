"""``tldist bench``: open the package, find its bundle, let them take turns, say which is how fast."""

from __future__ import annotations

import platform
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from tldist.bench.contenders import Contenders, first_output, forget_compiled, gather, torch_threads
from tldist.bench.recipe import BenchRecipe
from tldist.bench.table import ONNX, Row, draw, make_rows, speed_up, to_text
from tldist.bench.timing import take_turns
from tldist.errors import MissingExtra, needs
from tldist.files import write_text
from tldist.process import core_count
from tldist.progress import say, show_plan, warn
from tldist.runs import Outcome, RunFolder, open_run, recorded
from tldist.runtime.package import REFERENCE, Package
from tldist.runtime.provider import DEVICES
from tldist.runtime.reference import SLACK, Reference, read_reference

PICTURE = "bench.svg"
_TOLERANCES = {"bf16": 0.2, "fp16": 0.05, "cuda": 0.02, "cpu": 1e-3}
"""Relative error of a variant that still computes this model: by its precision, else by its device (GPUs
round the inputs of float32 convolutions to TF32). Another model, mean or channel order is off by more."""


def run(recipe: BenchRecipe) -> Outcome:
    """Measure a package.

    Raises:
        TldistError: the package does not run here, or the bundle is another one.
    """
    count = recipe.threads or core_count()
    start = time.perf_counter()
    graphs = recipe.batches if recipe.cuda_graphs else ()
    package = Package.open(recipe.package, threads=count, provider=recipe.provider, cuda_graphs=graphs)
    opened = time.perf_counter() - start
    inputs = {"package": package.config.identity}
    folder = open_run("bench", recipe.out, recipe, inputs) if recipe.out else None
    if folder and folder.finished:
        return _finished(folder)
    device = DEVICES.get(package.session.provider, "cpu")
    with recorded(folder, enabled=True) if folder else nullcontext():
        contenders = gather(recipe, package, device)
        _show(recipe, package, device, count, contenders)
        with torch_threads(count, contenders):
            rows = _measure(recipe, package, device, contenders)
        values = {
            **inputs,
            "device": device,
            "machine": _machine(),
            "opened_seconds": opened,
            "runtime": package.session.describe(),
            "speed_up": speed_up(rows),
            "rows": [row.to_dict() for row in rows],
        }
        return _outcome(recipe, folder, rows, values)


def _measure(recipe: BenchRecipe, package: Package, device: str, contenders: Contenders) -> list[Row]:
    images, expected, own = _pictures(package, read_reference(package.path / REFERENCE))
    allowed = {name: max(_tolerance(name, device, package), SLACK * own) for name in contenders}
    rows = []
    for batch in recipe.batches:
        chosen = np.arange(batch) % len(images)
        say(f"batch {batch}: {len(contenders)} variants take turns")
        forget_compiled(contenders)
        timings = take_turns(contenders, images[chosen], recipe.seconds, recipe.rounds)
        rows += make_rows(batch, timings, expected[chosen], allowed)
    return rows


def _pictures(package: Package, reference: Reference) -> tuple[np.ndarray, np.ndarray, float]:
    """Stored pictures of one size, PyTorch's answers (N, D), and the relative error of its float32."""
    name, groups = first_output(package), reference.samples.group_of
    rows, images = next(reference.samples.by_size())
    kept = groups[rows] == groups[rows[0]]  # the pictures: int8 is not held to its answers on noise
    expected = reference.expected[name][rows][kept]
    referee = reference.referee.get(name)
    own = 0.0 if referee is None else float(np.abs(referee[rows][kept] - expected).max())
    return images[kept], expected, own / (float(np.abs(expected).max()) or 1.0)


def _tolerance(variant: str, device: str, package: Package) -> float:
    if variant == ONNX:
        return float(package.config.profile["tolerances"]["max_relative"])  # the self-test has read it
    words = variant.replace("_weights", "").split("+")
    return next((_TOLERANCES[word] for word in words if word in _TOLERANCES), _TOLERANCES[device])


def _show(recipe: BenchRecipe, package: Package, device: str, count: int, contenders: Contenders) -> None:
    placement = package.session.placement
    show_plan(
        "bench",
        {
            "package": f"{recipe.package}: {package.config.profile_name}",
            "nodes": placement.to_text() if placement else package.session.provider,
            "PyTorch": f"{', '.join(name for name in contenders if name != ONNX) or 'none'} (on {device})",
            "threads": count,
            "batches": ", ".join(map(str, recipe.batches)),
            "each": f"{recipe.seconds:g} s in {recipe.rounds} rounds, after warming up",
        },
    )
    if package.config.input == "picture":
        say("the package resizes inside its graph; PyTorch's time includes the same resize by Pillow")


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"processor": names[0] if names else platform.processor(), "cores": core_count()}


def _outcome(
    recipe: BenchRecipe, folder: RunFolder | None, rows: list[Row], values: dict[str, Any]
) -> Outcome:
    text = to_text(rows)
    if values["speed_up"] is not None:
        text += f"\nONNX Runtime is {values['speed_up']:.2f} times as fast as PyTorch eager (geometric mean)"
    passed = not any(row.wrong or row.failed for row in rows if row.variant == ONNX)
    if folder:
        _draw(folder, rows)
        folder.write_summary("done" if passed else "failed", text=text, **values)
    return Outcome("bench", recipe.out, values, text, passed=passed)


def _draw(folder: RunFolder, rows: list[Row]) -> None:
    try:
        with needs("report"):
            write_text(folder.path / PICTURE, draw(rows))
    except MissingExtra as error:
        warn(f"no {PICTURE} is drawn: {error}")


def _finished(folder: RunFolder) -> Outcome:
    values = {name: value for name, value in folder.summary.items() if name not in ("stage", "status")}
    text = f"finished before: {folder.path} is complete.\n{values.pop('text', '')}"
    return Outcome("bench", folder.path, values, text)
