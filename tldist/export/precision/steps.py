"""What was done to a graph, step by step: plain data for the package and the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import onnx

from tldist.export.precision.closeness import Closeness, closeness
from tldist.export.precision.graphs import size_of
from tldist.export.precision.running import LEVELS, Latency, measure, open_proto, run
from tldist.export.profile import Profile

Judge = Callable[[onnx.ModelProto], Sequence[str]]
"""What parity says is wrong with a graph; nothing where it agrees with PyTorch."""

GAIN = 0.98
"""A step is faster if it takes less than this share of the time before it: below that, it is noise."""


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of the step.
        what: it did, in words.
        nodes, bytes: of the graph, before and after.
        faults: what parity says is wrong after it; empty: it agrees with PyTorch.
        closeness: to the float32 graph, on the images that decisions were judged on.
        latency: median milliseconds of a run on the profile's provider (a CPU: one thread), by batch size.
        unmeasured: why there is no latency, or none at some batch size.
        dropped: why the step was undone; empty: it was kept.
        levels: latency of one image at each of ONNX Runtime's levels, applied when it loads the file.
    """

    name: str
    what: str
    nodes: tuple[int, int]
    bytes: tuple[int, int]
    faults: tuple[str, ...] = ()
    closeness: Closeness | None = None
    latency: Latency | None = None
    unmeasured: str = ""
    dropped: str = ""
    levels: Latency = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        plain = asdict(self)
        return {**plain, "nodes": list(self.nodes), "bytes": list(self.bytes), "faults": list(self.faults)}


class Recorder:
    """Writes down steps; knows the float32 graph's answers, and what is measured on.

    Args:
        proto: the float32 graph.
        profile: what it is made for.
        judge: parity.
        judged: uint8 (N, H, W, 3), the images that decisions are compared on.
    """

    def __init__(self, proto: onnx.ModelProto, profile: Profile, judge: Judge, judged: np.ndarray) -> None:
        self.profile, self.judge, self.judged = profile, judge, judged
        self.expected = run(self.open(proto), judged)
        self.steps: list[Step] = []

    def open(self, proto: onnx.ModelProto, level: str = "all") -> Any:
        """A session on the profile's provider."""
        return open_proto(proto, self.profile.provider, self.profile.provider_options, level=level)

    def closeness(self, proto: onnx.ModelProto) -> Closeness:
        """How near a graph is to the float32 one."""
        found = run(self.open(proto), self.judged)
        return closeness(self.expected, found)

    def latency(self, *protos: onnx.ModelProto) -> list[Latency]:
        """The latencies of several graphs, measured in turn."""
        sessions = {str(number): self.open(proto) for number, proto in enumerate(protos)}
        return list(measure(sessions, self.judged[:1]).values())

    def add(
        self,
        name: str,
        what: str,
        before: onnx.ModelProto,
        after: onnx.ModelProto,
        latency: Latency | None = None,
        dropped: str = "",
    ) -> None:
        """Write a step down, and what parity says about the graph after it."""
        if latency is None:
            (latency,) = self.latency(after)
        left_out = "" if len(latency) > 1 else "a batch of 32 takes more than 20 s here"
        self.steps.append(
            Step(
                name,
                what,
                (len(before.graph.node), len(after.graph.node)),
                (size_of(before), size_of(after)),
                tuple(self.judge(after)),
                self.closeness(after),
                latency,
                left_out,
                dropped,
            )
        )

    def add_levels(self, proto: onnx.ModelProto) -> None:
        """Write down what ONNX Runtime's own levels bring when it loads the file."""
        sessions = {level: self.open(proto, level) for level in LEVELS}
        found = measure(sessions, self.judged[:1], (1,))
        levels = {level: times["1"] for level, times in found.items() if times}
        size = (size_of(proto), size_of(proto))
        count = (len(proto.graph.node), len(proto.graph.node))
        what = (
            "what ONNX Runtime does to the graph when it loads the file, at each of its levels: "
            "applied where it serves, never stored (the last level is made for one CPU)"
        )
        self.steps.append(Step("onnxruntime levels", what, count, size, levels=levels))


def unmeasured(proto: onnx.ModelProto, reason: str) -> Step:
    """The first step, of a graph that cannot be run from memory."""
    count = len(proto.graph.node)
    return Step("exporter", "the exporter's graph", (count, count), (size_of(proto),) * 2, unmeasured=reason)


def ratio(before: Latency, after: Latency) -> float:
    """Time after over time before: geometric mean over the batch sizes of both."""
    both = [after[batch] / before[batch] for batch in before if batch in after]
    return float(np.exp(np.mean(np.log(both)))) if both else 1.0
