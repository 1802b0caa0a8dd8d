"""Finds the layers that int8 costs accuracy, and leaves them in float32: as few as the budget needs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx

from tldist.errors import CheckFailed
from tldist.export.precision.quantize import Plan, quantizable, quantize
from tldist.export.precision.search import pruned, smallest_prefix, told
from tldist.export.precision.sensitivity import roundings
from tldist.progress import say

Within = Callable[[onnx.ModelProto], str]
"""Why a graph is not good enough; empty where it is."""

MOST = 0.5
"""Beyond this share of the roundings, int8 would be a name only."""
_TRIALS = 12
"""How many of the roundings that were left out are tried again."""


@dataclass(frozen=True)
class Excluded:
    """An int8 graph within its budget.

    Attributes:
        proto: the graph.
        names: nodes that stayed float32, in order.
        tried: how many graphs were tried.
        first: why the graph without exclusions was not good enough; empty: it was.
    """

    proto: onnx.ModelProto
    names: tuple[str, ...]
    tried: int
    first: str


def within_budget(plan: Plan, within: Within, images: np.ndarray) -> Excluded:
    """Quantise, with as few nodes left in float32 as the budget needs.

    Roundings are ranked by the error that each alone makes at the outputs (`sensitivity`); as many of the
    most harmful ones as needed are done without, and those that turn out not to matter happen after all.

    Args:
        plan: what is quantised, and how.
        within: says why a graph is not good enough.
        images: uint8 (N, H, W, 3), a few, that the roundings are ranked on.

    Raises:
        CheckFailed: half of the roundings left out do not suffice.
    """
    proto = quantize(plan)
    if not (first := within(proto)):
        return Excluded(proto, (), 1, "")
    say(f"int8: {first}; looking for the layers that cost it")
    ranked = {one.name: one.nodes for one in roundings(plan, images)}
    trials, last = 1, first

    def nodes(names: Collection[str]) -> frozenset[str]:
        return frozenset[str]().union(*(ranked[name] for name in names))

    def good(names: frozenset[str]) -> bool:
        nonlocal trials, last
        trials, last = trials + 1, within(quantize(plan, nodes(names)))
        return not last

    accept = told(good, "int8")
    candidates = list(ranked)[: max(1, int(MOST * len(ranked)))]
    prefix = smallest_prefix(candidates, accept) if ranked else None
    if prefix is None:
        raise CheckFailed(
            f"int8 does not stay within its budget, even without {len(candidates)} of {len(ranked)} "
            f"roundings, {len(nodes(candidates))} nodes in float32 ({trials} graphs tried). All in int8: "
            f"{first}; with those in float32: {last}. More calibration images like those it will see, "
            f"another quantization.method, or a larger quantization.budget may help."
        )
    chosen = nodes(pruned(prefix, accept, _TRIALS))
    order = [node.name for node in quantizable(plan) if node.name in chosen]
    return Excluded(quantize(plan, chosen), tuple(order), trials, first)
