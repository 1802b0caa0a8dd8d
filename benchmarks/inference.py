"""Exported models against PyTorch on a CPU, one thread; and how often int8 decides as float32 does.

    python benchmarks/inference.py speed
    python benchmarks/inference.py agreement BUNDLE=DOMAIN [BUNDLE=DOMAIN ...]

``speed``: random weights (BatchNorm calibrated); every variant takes the same uint8 pictures and normalises
them, all of them in turn within one run; medians. ``agreement``: fine-tuned bundles; int8 is calibrated and
held to its budget on 256 pictures of the training split, and compared with float32 PyTorch on ``--images``
pictures of the other one (of a domain with fewer than 256, on all that there are). Both print Markdown.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from common import machine
from torch import nn
from torchvision import models

from tldist.domain import DataRecipe, open_domain
from tldist.export.converter import convert
from tldist.export.graph import ExportGraph, load_graph
from tldist.export.natural import natural_images
from tldist.export.precision.lower import lower
from tldist.export.precision.running import open_proto, run
from tldist.export.profile import Profile, find_profile
from tldist.models.load import input_tensor
from tldist.runtime.preprocess import Preprocessing, prepare

MODELS = ("resnet18", "resnet50", "mobilenet_v3_small")
HOW = Preprocessing(height=224, width=224, resize=256)
FIT = 256
"""Pictures that int8 is calibrated and held to its budget on."""
Call = Callable[[np.ndarray], object]
BASE, ONNX, INT8 = "eager", "ONNX fp32", "ONNX int8"
LONGEST = 60.0
"""Seconds of compiling beyond which a compiled variant is marked."""


def network(name: str) -> nn.Module:
    """A network with random weights, its BatchNorm calibrated on generated pictures."""
    torch.manual_seed(0)
    model: nn.Module = getattr(models, name)(weights=None)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    model.train()
    with torch.no_grad():
        model(input_tensor(torch.from_numpy(natural_images(32, 224, 224, seed=7)), HOW, dtype=torch.float32))
    return model.eval()


def pytorch_variants(model: nn.Module, with_compile: bool) -> dict[str, Call]:
    """Every way to run the model in PyTorch, from uint8 pictures (N, H, W, 3) to logits."""

    def variant(half: bool = False, last: bool = False, auto: bool = False, compiled: bool = False) -> Call:
        dtype = torch.bfloat16 if half else torch.float32
        layout = torch.channels_last if last else torch.contiguous_format
        own = copy.deepcopy(model).to(dtype=dtype, memory_format=layout)

        def forward(images: torch.Tensor) -> torch.Tensor:
            pixels = input_tensor(images, HOW, dtype=torch.float32)
            return own(pixels.to(dtype=dtype, memory_format=layout))

        called = torch.compile(forward, dynamic=False) if compiled else forward

        def call(images: np.ndarray) -> object:
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=auto):
                return called(torch.from_numpy(images))

        return call

    found = {
        BASE: variant(),
        "channels_last": variant(last=True),
        "bf16 autocast": variant(auto=True),
        "autocast, channels_last": variant(auto=True, last=True),
        "bf16 weights": variant(half=True),
        "bf16, channels_last": variant(half=True, last=True),
    }
    if with_compile:
        found["compile"] = variant(compiled=True)
        found["compile, channels_last"] = variant(last=True, compiled=True)
        found["compile, bf16, channels_last"] = variant(half=True, last=True, compiled=True)
    return found


def to_onnx(graph: nn.Module) -> onnx.ModelProto:
    """The float32 graph."""
    converted = convert(graph, None)
    return getattr(converted, "proto", converted)


def int8_of(proto: onnx.ModelProto, profile: Profile, images: np.ndarray) -> onnx.ModelProto:
    """The int8 graph, all steps made, calibrated and judged on ``images``."""
    return lower(proto, profile, judge=lambda made: [], judged=images, calibration=images).proto


def without_budget(profile: Profile) -> Profile:
    """The same profile for random weights, whose decisions mean nothing."""
    loose = profile.quantization.model_copy(update={"budget": 1.0})
    return profile.model_copy(update={"quantization": loose})


def onnx_call(proto: onnx.ModelProto) -> Call:
    """A graph on one thread of ONNX Runtime's CPU provider."""
    session = open_proto(proto)
    return lambda images: session.run(None, {"images": images})


def timed(
    calls: dict[str, Call], images: np.ndarray, turns: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each call, run in turn; and the seconds of each one's first call."""
    first = {name: _seconds(call, images, 1) for name, call in calls.items()}
    repeats = {name: max(1, int(0.05 / _seconds(call, images, 1))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            times[name].append(_seconds(call, images, repeats[name]))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}, first


def _seconds(call: Call, images: np.ndarray, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call(images)
    return (time.perf_counter() - start) / repeats


def speed(names: list[str], batches: list[int], turns: int, with_compile: bool) -> None:
    """Print the table of latencies, and what follows from it."""
    profile = without_budget(find_profile("cpu-int8"))
    results: dict[tuple[str, int], dict[str, float]] = {}
    slow: set[str] = set()
    for name in names:
        model = network(name)
        proto = to_onnx(ExportGraph(model, HOW, ("logits",)).eval())
        calls = pytorch_variants(model, with_compile)
        calls[ONNX] = onnx_call(proto)
        calls[INT8] = onnx_call(int8_of(proto, profile, natural_images(32, 224, 224, seed=3)))
        for batch in batches:
            results[name, batch], first = timed(calls, natural_images(batch, 224, 224, seed=1), turns)
            slow |= {variant for variant, seconds in first.items() if seconds > LONGEST}
            print(f"# {name}, batch {batch}: {results[name, batch]}", flush=True)
    _print_latencies(results, slow)
    _print_ratios(results)


def _print_latencies(results: dict[tuple[str, int], dict[str, float]], slow: set[str]) -> None:
    columns = list(next(iter(results.values())))
    print(f"\n{machine()}, onnx on one thread too; milliseconds\n")
    print("| | " + " | ".join(f"{name}, {batch}" for name, batch in results) + " |")
    print("| --- |" + " --- |" * len(results))
    for column in columns:
        cells = (f"{times[column]:.4g}" for times in results.values())
        mark = " (compiled in more than a minute)" if column in slow else ""
        print(f"| {column}{mark} | " + " | ".join(cells) + " |")


def _print_ratios(results: dict[tuple[str, int], dict[str, float]]) -> None:
    def fastest(times: dict[str, float]) -> float:
        return min(value for name, value in times.items() if name not in (ONNX, INT8))

    rows: dict[str, Callable[[dict[str, float]], float]] = {
        "eager / ONNX fp32": lambda times: times[BASE] / times[ONNX],
        "eager / ONNX int8": lambda times: times[BASE] / times[INT8],
        "fastest PyTorch / ONNX int8": lambda times: fastest(times) / times[INT8],
        "ONNX fp32 / ONNX int8": lambda times: times[ONNX] / times[INT8],
    }
    print(
        "\n| | "
        + " | ".join(f"{name}, {batch}" for name, batch in results)
        + " | geometric mean | 1 and 32 |"
    )
    print("| --- |" + " --- |" * (len(results) + 2))
    for label, ratio in rows.items():
        values = [ratio(times) for times in results.values()]
        ends = [ratio(times) for (_, batch), times in results.items() if batch in (1, 32)] or values
        means = (statistics.geometric_mean(values), statistics.geometric_mean(ends))
        print(f"| {label} | " + " | ".join(f"{value:.2f}" for value in (*values, *means)) + " |")


def agreement(pairs: list[str], images: int) -> None:
    """Print how often int8 and float32 ONNX decide as PyTorch does."""
    print(f"\n{machine()}\n")
    print(
        "| bundle | domain | pictures | fp32 agrees | int8 agrees | int8 cosine | left in float32 | bytes |"
    )
    print("| --- |" + " --- |" * 7)
    for pair in pairs:
        bundle, _, domain = pair.partition("=")
        print(_agreement_row(Path(bundle), domain, images), flush=True)


def _agreement_row(bundle: Path, domain: str, images: int) -> str:
    graph, config = load_graph(bundle, ("logits",))
    fitted = _pictures(domain, "train", FIT, config.preprocessing)
    shown = _pictures(domain, "val", images, config.preprocessing)
    if len(fitted) + len(shown) <= FIT:  # a small domain: all that there is
        shown = np.concatenate([fitted, shown])
    proto = to_onnx(graph)
    profile = find_profile("cpu-int8")
    made = lower(proto, profile, judge=lambda made: [], judged=fitted, calibration=fitted)
    with torch.no_grad():
        parts = [graph(torch.from_numpy(shown[at : at + 32]))[0] for at in range(0, len(shown), 32)]
    expected = torch.cat(parts).numpy()
    plain, low = (run(open_proto(one), shown)["logits"] for one in (proto, made.proto))
    norms = np.linalg.norm(low, axis=1) * np.linalg.norm(expected, axis=1)
    left = next((step.what.split(" ")[0] for step in made.steps if step.name == "float32 layers"), "0")
    agrees = [f"{(one.argmax(1) == expected.argmax(1)).mean():.2%}" for one in (plain, low)]
    share = made.steps[-1].bytes[1] / made.steps[0].bytes[0]
    name = bundle.parent.name if bundle.name == "bundle" else bundle.name
    cells = (name, Path(domain).name, f"{len(shown):,}", *agrees,
             f"{((low * expected).sum(1) / norms).min():.4f}", f"{left} nodes", f"{share:.0%}")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _pictures(domain: str, split: str, count: int, how: Preprocessing) -> np.ndarray:
    chosen = open_domain(DataRecipe(path=domain, split=split)).limited(count)
    return np.stack([prepare(chosen.read(index), how) for index in range(len(chosen))])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    fast = commands.add_parser("speed")
    fast.add_argument("--models", nargs="+", default=list(MODELS))
    fast.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    fast.add_argument("--turns", type=int, default=7)
    fast.add_argument("--no-compile", action="store_true", help="leave torch.compile out (minutes a model)")
    near = commands.add_parser("agreement")
    near.add_argument("pairs", nargs="+", metavar="BUNDLE=DOMAIN")
    near.add_argument("--images", type=int, default=2000)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    if chosen.command == "speed":
        speed(chosen.models, chosen.batches, chosen.turns, not chosen.no_compile)
    else:
        agreement(chosen.pairs, chosen.images)


if __name__ == "__main__":
    main()
