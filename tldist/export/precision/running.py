"""Runs ONNX graphs that are in memory: their outputs, any value inside them, and how long they take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import onnx

from tldist.export.precision.graphs import copy_of
from tldist.runtime.provider import Settings, create_session
from tldist.runtime.session import CPU

LEVELS: dict[str, Literal["none", "basic", "extended", "all"]] = {
    "disable": "none", "basic": "basic", "extended": "extended", "all": "all",
}  # fmt: skip
"""What ONNX Runtime does to a graph when it loads it: as steps call it, and as the runtime does."""
BATCHES = (1, 32)
"""Images at once, whose latency is measured."""
Latency = dict[str, float]
"""Median milliseconds, by batch size."""

_ROUNDS = 7
_SECONDS = 4.0
_SPAN = 0.01
"""Seconds that are timed at once, at least, by repeating quick runs (up to 20 times)."""
_TOO_SLOW = 20.0
"""Seconds of one run above which that batch size is not measured."""


def open_proto(
    proto: onnx.ModelProto,
    provider: str = CPU,
    options: Mapping[str, str] | None = None,
    *,
    threads: int = 1,
    level: str = "all",
) -> Any:
    """An ``onnxruntime.InferenceSession`` of a graph, on one thread unless told otherwise.

    Raises:
        MachineError: the execution provider does not load it.
    """
    how = Settings(threads=threads, optimization=LEVELS[level])
    return create_session(proto.SerializeToString(), provider, dict(options or {}), how)


def run(session: Any, images: np.ndarray, batch: int = 16) -> dict[str, np.ndarray]:
    """All outputs for images, by name: (N, ...), in float32 where they are floating."""
    names = [value.name for value in session.get_outputs()]
    source = session.get_inputs()[0].name
    parts = [session.run(names, {source: images[at : at + batch]}) for at in range(0, len(images), batch)]
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}


def observe(
    proto: onnx.ModelProto,
    images: np.ndarray,
    names: Iterable[str],
    provider: str = CPU,
    options: Mapping[str, str] | None = None,
) -> dict[str, np.ndarray]:
    """Values inside a graph, by name, for one batch of images; float32. Nothing is fused or reordered."""
    there = {value.name for value in proto.graph.output}
    wanted = list(dict.fromkeys(names))
    seen = copy_of(proto)
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in there)
    session = open_proto(seen, provider, options, level="disable")
    values = session.run(wanted, {session.get_inputs()[0].name: images})
    return {name: np.asarray(value, np.float32) for name, value in zip(wanted, values)}


def measure(
    sessions: Mapping[str, Any], images: np.ndarray, batches: Sequence[int] = BATCHES
) -> dict[str, Latency]:
    """The latency of several sessions, run in turn so that whatever disturbs one disturbs all.

    Args:
        sessions: by name.
        images: uint8 (N, H, W, 3), repeated to fill a batch.
        batches: images at once.

    Returns:
        Median milliseconds of each by batch size; a size at which one run takes more than 20 s is left out.
    """
    found: dict[str, Latency] = {name: {} for name in sessions}
    for batch in batches:
        fed = np.resize(images, (batch, *images.shape[1:]))
        calls = {name: _call(session, fed) for name, session in sessions.items()}
        first = {name: _seconds(call) for name, call in calls.items()}  # warm-up; decides how many follow
        if max(first.values()) > _TOO_SLOW:
            continue
        rounds = int(np.clip(_SECONDS / max(sum(first.values()), 1e-9), 3, _ROUNDS))
        repeats = {name: int(np.clip(_SPAN / one, 1, 20)) for name, one in first.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(_seconds(call, repeats[name]))
        for name, values in times.items():
            found[name][str(batch)] = 1000 * statistics.median(values)
    return found


def _call(session: Any, fed: np.ndarray) -> Callable[[], object]:
    source = session.get_inputs()[0].name
    return lambda: session.run(None, {source: fed})


def _seconds(call: Callable[[], object], repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats
