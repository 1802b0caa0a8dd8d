"""Finds the layers that int8 costs accuracy, and leaves them in float32: as few as the budget needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from tldist.errors import CheckFailed
from tldist.export.precision.graphs import consumers
from tldist.export.precision.quantize import Plan, quantizable, quantize
from tldist.export.precision.running import observe
from tldist.export.precision.search import pruned, smallest_prefix, told
from tldist.progress import say

Within = Callable[[onnx.ModelProto], str]
"""Why a graph is not good enough; empty where it is."""

MOST = 0.5
"""Beyond this share of the quantised nodes, int8 would be a name only."""
_TRIALS = 12
"""How many of the excluded are tried in int8 again."""
_LIGHT = ("Relu", "Clip", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze")
"""Nodes that hand values on: their output is rounded with the step of their input."""


@dataclass(frozen=True)
class Excluded:
    """An int8 graph within its budget.

    Attributes:
        proto: the graph.
        names: nodes that stayed float32, most costly first.
        tried: how many graphs were tried.
        first: why the graph without exclusions was not good enough; empty: it was.
    """

    proto: onnx.ModelProto
    names: tuple[str, ...]
    tried: int
    first: str


def within_budget(plan: Plan, within: Within, images: np.ndarray) -> Excluded:
    """Quantise, with as few nodes left in float32 as the budget needs.

    Nodes are ranked by the rounding noise that appears in them (measured once, both graphs run side by side);
    then as few of that ranking as suffice go back to float32, and those that turn out not to be needed
    return to int8.

    Args:
        plan: what is quantised, and how.
        within: says why a graph is not good enough.
        images: uint8 (N, H, W, 3), a few, that the noise is measured on.

    Raises:
        CheckFailed: half of the nodes in float32 do not suffice.
    """
    proto = quantize(plan)
    if not (first := within(proto)):
        return Excluded(proto, (), 1, "")
    say(f"int8: {first}; looking for the layers that cost it")
    ranking = noise_ranking(plan, proto, images)
    trials, reasons = 1, [first]

    def good(names: frozenset[str]) -> bool:
        nonlocal trials
        trials += 1
        reasons.append(within(quantize(plan, names)))
        return not reasons[-1]

    accept = told(good, "int8")
    limit = max(1, int(MOST * len(ranking)))
    prefix = smallest_prefix(ranking[:limit], accept)
    if prefix is None:
        raise CheckFailed(
            f"int8 does not stay within its budget, even with {limit} of {len(ranking)} nodes in float32 "
            f"({trials} graphs tried). All in int8: {first}; with those in float32: {reasons[-1]}. More "
            f"calibration images like those it will see, another quantization.method, or a larger "
            f"quantization.budget may help."
        )
    chosen = pruned(prefix, accept, _TRIALS)
    return Excluded(quantize(plan, frozenset(chosen)), chosen, trials, first)


def noise_ranking(plan: Plan, proto: onnx.ModelProto, images: np.ndarray) -> list[str]:
    """Quantised nodes by the noise that appears in them, most first, each followed by those that read it.

    A node's noise is the mean square of the difference to float32 at its output, relative to the variance
    there, less that at its inputs. What it gives stays rounded as long as a reader of it is quantised.
    """
    nodes = quantizable(plan)
    inner = [name for node in nodes for name in (*node.input, *node.output)]
    noise = _noise(plan.proto, proto, images, inner)
    rise = {
        node.name: noise.get(node.output[0], 0.0)
        - max((noise.get(name, 0.0) for name in node.input), default=0.0)
        for node in nodes
    }
    read_by, known = consumers(plan.proto), {node.name: node for node in nodes}
    ranking: dict[str, None] = {}
    for name in sorted(rise, key=lambda name: -rise[name]):
        for one in (name, *_readers(known[name], read_by)):
            if one in known:
                ranking.setdefault(one)
    return list(ranking)


def _readers(node: onnx.NodeProto, read_by: Mapping[str, list[onnx.NodeProto]]) -> list[str]:
    """Names of the nodes that read a node's output, also behind nodes that only hand it on."""
    found: list[str] = []
    for reader in (one for name in node.output for one in read_by.get(name, ())):
        found.append(reader.name)
        if reader.op_type in _LIGHT:
            found += _readers(reader, read_by)
    return found


def _noise(
    exact: onnx.ModelProto, rounded: onnx.ModelProto, images: np.ndarray, names: list[str]
) -> dict[str, float]:
    """The noise of every value that both graphs have, after its rounding where it is rounded."""
    made = {name for node in exact.graph.node for name in node.output}
    there = {name for node in rounded.graph.node for name in node.output}
    pairs = {}
    for name in dict.fromkeys(names):
        seen = next((one for one in (f"{name}_DequantizeLinear_Output", name) if one in there), None)
        if seen and name in made:
            pairs[name] = seen
    before = observe(exact, images, pairs)
    after = observe(rounded, images, pairs.values())
    return {
        name: float(np.square(before[name] - after[seen]).mean() / max(before[name].var(), 1e-12))
        for name, seen in pairs.items()
    }
