"""What an ONNX graph computes inside: the values between its nodes, run by ONNX Runtime. Needs onnx."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from tldist.export.picture import FITTED
from tldist.runtime.session import CPU, INPUT

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
"""ONNX Runtime's optimisation levels, from none on."""
_PRECISION = ("Cast", "QuantizeLinear", "DequantizeLinear")
_FOLDER = "session.model_external_initializers_file_folder_path"
_SILENT = 4
_WEIGHT_ERROR = 1e-6
"""Relative: weights into which the exporter folded a normalisation may differ by rounding."""


@dataclass(frozen=True)
class Graph:
    """An ONNX graph.

    Attributes:
        proto: nodes and, unless they lie beside it, weights.
        folder: where its external data lies; None: it has none.
    """

    proto: onnx.ModelProto
    folder: Path | None = None

    @classmethod
    def open(cls, model: Path | onnx.ModelProto) -> Graph:
        """Of a file, whose external data stays on disk, or of a model in memory."""
        if isinstance(model, onnx.ModelProto):
            return cls(model)
        return cls(onnx.load(model, load_external_data=False), model.parent)

    def values(self) -> list[str]:
        """Names of what its nodes give, in topological order."""
        return [name for node in self.proto.graph.node for name in node.output if name]

    def values_of_network(self) -> list[str]:
        """The same without what no module computes: a resize of pictures in front of it, and what lower
        precisions put between its nodes."""
        every = self.values()
        front = set(every[: every.index(FITTED) + 1]) if FITTED in every else set()
        nodes = [node for node in self.proto.graph.node if node.op_type not in _PRECISION]
        return [name for node in nodes for name in node.output if name and name not in front]

    def as_read(self) -> dict[str, str]:
        """For each value that is quantised, the name of what its readers see of it: quantised and back.

        A quantised graph needs no ReLU: the quantisation clips what is negative, so that the value before it
        is not what PyTorch calls by its name.
        """
        ints = {node.input[0]: node.output[0] for node in self._of("QuantizeLinear")}
        back = {node.input[0]: node.output[0] for node in self._of("DequantizeLinear")}
        return {name: back[whole] for name, whole in ints.items() if whole in back}

    def _of(self, op: str) -> list[onnx.NodeProto]:
        return [node for node in self.proto.graph.node if node.op_type == op]

    def weight(self, name: str) -> np.ndarray | None:
        """An initialiser; None where there is none of that name."""
        for tensor in self.proto.graph.initializer:
            if tensor.name == name:
                array: np.ndarray = numpy_helper.to_array(tensor, base_dir=str(self.folder or ""))
                return array
        return None


def run_values(
    graph: Graph, names: Collection[str], images: np.ndarray, level: str = LEVELS[0], provider: str = CPU
) -> dict[str, np.ndarray]:
    """The values of the given names, as their readers see them, beside the outputs.

    Args:
        graph: to run.
        names: of values of nodes.
        images: uint8 (N, H, W, 3).
        level: of optimisation; none, so that every node computes its own value.
        provider: that runs it.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    there = {value.name for value in proto.graph.output}
    read = graph.as_read()
    asked = {name: read.get(name, name) for name in names if name not in there}
    exposed = dict.fromkeys(name for name in asked.values() if name not in there)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in exposed)
    found = run_at(Graph(proto, graph.folder), level, provider, images)
    return {name: found[name] for name in there} | {name: found[seen] for name, seen in asked.items()}


def run_at(graph: Graph, level: str, provider: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs of a graph at one optimisation level on one provider."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    if graph.folder is not None:
        options.add_session_config_entry(_FOLDER, str(graph.folder))
    data = graph.proto.SerializeToString()
    session: Any = onnxruntime.InferenceSession(data, options, providers=[provider], enable_fallback=0)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {INPUT: images})))


def find_difference(graph: Graph, fresh: Graph, nodes: Sequence[onnx.NodeProto]) -> str:
    """What nodes have otherwise than in a fresh export: type, attributes or weights; empty: nothing."""
    written = {name: node for node in fresh.proto.graph.node for name in node.output}
    quantized = bool(graph.as_read())  # its nodes are others by intention
    for node in nodes:
        theirs = written.get(node.output[0])
        if theirs is None or quantized:
            continue
        if theirs.op_type != node.op_type:
            return f"in a fresh export '{node.output[0]}' is computed by {theirs.op_type}, not {node.op_type}"
        if changed := _attributes(theirs).items() - _attributes(node).items():
            return f"in a fresh export {node.op_type} has the attributes {dict(sorted(changed))}"
        for ours, other in zip(node.input, theirs.input):
            if words := _weight_difference(ours, graph.weight(ours), fresh.weight(other)):
                return words
    return ""


def _attributes(node: onnx.NodeProto) -> dict[str, str]:
    """As text, defaults included; without tensors, which may be large."""
    if not onnx.defs.has(node.op_type, node.domain):
        known = []
    else:
        schema = onnx.defs.get_schema(node.op_type, node.domain)
        known = [value.default_value for value in schema.attributes.values()]
    plain = [entry for entry in (*known, *node.attribute) if entry.name and not entry.HasField("t")]
    return {entry.name: str(onnx.helper.get_attribute_value(entry)) for entry in plain}


def _weight_difference(name: str, ours: np.ndarray | None, theirs: np.ndarray | None) -> str:
    if ours is None or theirs is None or ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return ""
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    gap = np.nan_to_num(gap, nan=np.inf)
    largest = float(gap.max(initial=0.0))
    if largest <= _WEIGHT_ERROR * float(np.abs(theirs).max(initial=0.0)):
        return ""
    place = np.unravel_index(int(gap.argmax()), gap.shape)
    changed = int((gap > _WEIGHT_ERROR * float(np.abs(theirs).max())).sum())
    where = ", ".join(str(int(axis)) for axis in place)
    return (
        f"its weight '{name}' differs from the bundle's in {changed:,} of {gap.size:,} values: at [{where}] "
        f"{float(theirs[place]):.7g} in the bundle, {float(ours[place]):.7g} in the package"
    )
