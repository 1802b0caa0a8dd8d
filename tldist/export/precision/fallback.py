"""Finds the nodes that must stay float32 for a half-precision graph to agree: overflows, departures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from tldist.errors import CheckFailed
from tldist.export.precision.graphs import consumers, float_outputs, producers
from tldist.export.precision.half import LARGEST, Half, HalfKind, to_half
from tldist.export.precision.running import observe
from tldist.export.precision.search import pruned, smallest_prefix, told
from tldist.progress import say

Judge = Callable[[onnx.ModelProto], Sequence[str]]
"""What is wrong with a graph; nothing where it agrees."""
Watch = Callable[[onnx.ModelProto, np.ndarray, Iterable[str]], dict[str, np.ndarray]]
"""Values inside a graph, by name, for one batch of images; float32."""

HEADROOM = 2.0
"""A value within this factor of the largest fp16 number counts as beyond it: other images have larger."""
_STEP = 2.0**-11
"""The relative rounding error of fp16; errors below it are no departure."""


@dataclass(frozen=True)
class Found:
    """A half-precision graph that agrees.

    Attributes:
        half: the graph.
        faults: what the judge says of it: nothing, or what could not be mended.
        tried: how many graphs were judged.
    """

    half: Half
    faults: tuple[str, ...]
    tried: int


def find_half(
    proto: onnx.ModelProto,
    kind: HalfKind,
    judge: Judge,
    images: np.ndarray,
    *,
    watch: Watch = observe,
    keep: Mapping[str, str] | None = None,
) -> Found:
    """Convert to half precision, with as few nodes in float32 as agreement needs.

    Nodes whose values are beyond fp16 on some image stay float32 at once. If the graph still does not agree,
    both graphs are run side by side, and the nodes where the error grows most go back to float32: as few of
    that ranking as suffice, without those that turn out not to be needed.

    Args:
        proto: float32, with names and types (`with_names`).
        kind: the half type.
        judge: says what is wrong with a graph.
        images: uint8 (N, H, W, 3), some real ones and extremes, that the graphs are run on side by side.
        watch: gives values inside a graph. It must compute in half precision what is in half precision:
            ONNX Runtime's CPU does most of it in float32, where nothing overflows.
        keep: names of nodes, or operator types, that stay float32, and why.

    Raises:
        CheckFailed: no choice of nodes agrees.
    """
    exact = watch(proto, images, _values(proto))
    kept = {**dict(keep or {}), **(_overflowing(proto, exact, kind))}
    half = to_half(proto, kind, kept)
    if not (faults := tuple(judge(half.proto))):
        return Found(half, (), 1)
    say(f"{kind} does not agree yet ({faults[0]}); looking for the nodes that must stay float32")
    ranking = _departures(proto, half, exact, watch(half.proto, images, _values(proto)))
    trials = 1

    def agrees(names: frozenset[str]) -> bool:
        nonlocal trials
        trials += 1
        return not judge(to_half(proto, kind, {**kept, **_reasons(names, ranking)}).proto)

    accept = told(agrees, kind)
    # Beyond half of them, half precision would be a name only.
    prefix = smallest_prefix(list(ranking)[: max(1, len(ranking) // 2)], accept) if ranking else None
    if prefix is None:
        raise CheckFailed(
            f"{kind} does not agree with the float32 graph, even with {len(ranking) // 2} of "
            f"{half.lowered} nodes in float32 ({trials} graphs tried): {'; '.join(faults)}."
        )
    chosen = pruned(prefix, accept)
    return Found(to_half(proto, kind, {**kept, **_reasons(chosen, ranking)}), (), trials)


def _values(proto: onnx.ModelProto) -> list[str]:
    return [name for _, name in float_outputs(proto)]


def _reasons(names: Collection[str], ranking: Mapping[str, float]) -> dict[str, str]:
    def reason(growth: float) -> str:
        return f"the error grows {growth:.0f}-fold in it" if np.isfinite(growth) else "NaN or infinite in it"

    return {name: reason(growth) for name, growth in ranking.items() if name in names}


def _overflowing(proto: onnx.ModelProto, exact: Mapping[str, np.ndarray], kind: HalfKind) -> dict[str, str]:
    """The nodes that make a value beyond the half type, and those that read it."""
    limit = LARGEST[kind] / HEADROOM
    read_by = consumers(proto)
    found: dict[str, str] = {}
    for node, name in float_outputs(proto):
        largest = float(np.abs(exact[name]).max(initial=0.0))
        if largest > limit:
            for one in (node, *read_by.get(name, ())):
                found.setdefault(one.name, f"{name} reaches {largest:.1e}, near or beyond {kind}'s largest")
    return found


def _departures(
    proto: onnx.ModelProto, half: Half, exact: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Nodes in half precision by how much the relative error grows in them, largest first.

    What a node reads was rounded where it was made: with a node comes whoever made what it reads.
    """
    errors = {name: _error(exact[name], found[name]) for name in exact}
    made_by = producers(proto)
    growth: dict[str, float] = {}
    for node, name in float_outputs(proto):
        if node.name in half.kept:
            continue
        before = max((errors.get(source, 0.0) for source in node.input), default=0.0)
        grown = errors[name] / max(before, _STEP) if np.isfinite(before) else 0.0
        growth[node.name] = max(grown, growth.get(node.name, 0.0))
    ranking: dict[str, float] = {}
    for name in sorted(growth, key=lambda name: -growth[name]):
        node = next(node for node in proto.graph.node if node.name == name)
        makers = (made_by[source].name for source in node.input if source in made_by)
        for one in (name, *makers):
            if one in growth:
                ranking.setdefault(one, growth[name])
    return ranking


def _error(exact: np.ndarray, found: np.ndarray) -> float:
    """Largest difference relative to the largest value; infinite where half precision is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    magnitude = max(float(np.abs(exact).max(initial=0.0)), float(np.finfo(np.float32).tiny))
    return float(np.abs(exact - found).max(initial=0.0)) / magnitude
