"""Where the nodes of a loaded graph run: on the provider that was asked for, or on the CPU beside it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CPU = "CPUExecutionProvider"

RECORD = "session.record_ep_graph_assignment_info"
"""The session's configuration entry by which ONNX Runtime, from 1.24 on, remembers where it put each node."""

SHAPE_OPERATORS = frozenset((
    "Shape", "Size", "Constant", "ConstantOfShape", "Gather", "Slice", "Split", "Concat", "Unsqueeze",
    "Squeeze", "Reshape", "Cast", "Range", "Expand", "Add", "Sub", "Mul", "Div", "Mod", "Neg", "Min", "Max",
    "Floor", "Ceil", "Sqrt", "Equal", "Not", "And", "Or", "Less", "Greater", "Where", "Identity",
    "ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax",
))  # fmt: skip
"""Operators that compute shapes from shapes. GPU providers have kernels for all of them; where ONNX Runtime
puts one on the CPU all the same, its values are a few integers that are needed there."""


@dataclass(frozen=True)
class Placement:
    """How many nodes of which operator run where.

    Attributes:
        nodes: number of nodes by operator, by provider.
    """

    nodes: dict[str, dict[str, int]]

    @classmethod
    def of(cls, pairs: Iterable[tuple[str, str]]) -> Placement:
        """From a pair (provider, operator) for each node."""
        found: dict[str, Counter[str]] = {}
        for provider, operator in pairs:
            found.setdefault(provider, Counter())[operator] += 1
        return cls({provider: dict(counts.most_common()) for provider, counts in found.items()})

    def count(self, provider: str) -> int:
        """Number of nodes that run on a provider."""
        return sum(self.nodes.get(provider, {}).values())

    def fallen(self, provider: str) -> dict[str, int]:
        """Nodes by operator that do the model's work on the CPU though another provider was asked for."""
        if provider == CPU:
            return {}
        here = self.nodes.get(CPU, {})
        return {operator: number for operator, number in here.items() if operator not in SHAPE_OPERATORS}

    def to_text(self) -> str:
        """Like ``CUDAExecutionProvider 120 nodes; CPUExecutionProvider 3 nodes (2 Shape, 1 Gather)``."""
        parts = []
        for provider, counts in sorted(self.nodes.items(), key=lambda item: -sum(item[1].values())):
            listed = f" ({list_counts(counts)})" if provider == CPU and len(self.nodes) > 1 else ""
            parts.append(f"{provider} {sum(counts.values())} nodes{listed}")
        return "; ".join(parts)


def list_counts(counts: dict[str, int]) -> str:
    """``2 Shape, 1 Gather``."""
    return ", ".join(f"{number} {operator}" for operator, number in counts.items())


def assigned(raw: Any) -> Placement | None:
    """What a session remembers, after basic optimisation; None where ONNX Runtime is too old to remember."""
    if not hasattr(raw, "get_provider_graph_assignment_info"):
        return None
    parts = raw.get_provider_graph_assignment_info()
    return Placement.of((part.ep_name, node.op_type) for part in parts for node in part.get_nodes())


def profiled(file: Path) -> Placement:
    """From ONNX Runtime's profile of a run (JSON): every node that ran, after all optimisations."""
    events = json.loads(file.read_text(encoding="utf-8"))
    ran = {
        event["name"]: (event["args"]["provider"], event["args"]["op_name"])
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    }
    return Placement.of(ran.values())
