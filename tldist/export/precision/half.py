"""From a float32 graph to one that computes in fp16 or bf16, where ONNX allows it and nobody forbids it.

Weights are rounded once, from float32, which is more exact than exporting a module that was made half. The
nodes that stay float32 hand each other float32 values: a value is cast only where the two regions meet. (That
is what ``onnxruntime.transformers.float16``, of ONNX Runtime 1.31, does not do: between two nodes that stay
float32 it casts down and up again, so that an overflow is not mended by keeping its nodes; two readers of one
value make a graph that does not load; and it knows no bf16.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import ml_dtypes
import numpy as np
import onnx
from onnx import defs, numpy_helper

from tldist.errors import ModelError
from tldist.export.precision.graphs import (
    FLOAT,
    WEIGHTED,
    captured,
    checked,
    copy_of,
    front_nodes,
    initializers,
    opset_of,
    set_nodes,
    types_of,
)
from tldist.export.profile import BF16_OPSET

HalfKind = Literal["fp16", "bf16"]
TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
NUMPY = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
LARGEST = {"fp16": 65504.0, "bf16": 3.3895e38}
"""The largest finite number of each type."""
_NAMES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}


@dataclass(frozen=True)
class Half:
    """A graph in half precision.

    Attributes:
        proto: float32 (and uint8) at its border, half inside.
        kept: nodes with float32 values that stay float32, by name, and why.
        lowered: how many nodes compute in half precision.
        lost: how many weights that were not 0 became 0, being too small.
        weights: how many weights were rounded.
    """

    proto: onnx.ModelProto
    kept: dict[str, str]
    lowered: int
    lost: int
    weights: int


def to_half(proto: onnx.ModelProto, kind: HalfKind, keep: Mapping[str, str] | None = None) -> Half:
    """Convert a float32 graph.

    Args:
        proto: float32, each node with a name of its own, types inferred (`with_names`).
        kind: the half type.
        keep: names of nodes, or operator types, that stay float32, and why.

    Raises:
        ModelError: ONNX knows no convolution of that type in the graph's operator set, or nothing is left to
            convert.
    """
    if kind == "bf16" and opset_of(proto) < BF16_OPSET:
        raise ModelError(
            f"bf16 needs ONNX operator set {BF16_OPSET} or later, and the graph has {opset_of(proto)}: "
            f"set opset: {BF16_OPSET} in the profile."
        )
    types, opset = types_of(proto), opset_of(proto)
    able = {node.name: slots for node in proto.graph.node if (slots := _halved(node, kind, opset, types))}
    kept = _kept(proto, kind, able, dict(keep or {}))
    plan = {name: slots for name, slots in able.items() if name not in kept}
    if not any(node.op_type in WEIGHTED for node in proto.graph.node if node.name in plan):
        raise ModelError(f"no convolution and no matrix product of the graph can be {kind}.")
    writer = _Writer(proto, kind, plan, types)
    half = writer.write()
    return Half(checked(half, kind), kept, len(plan), writer.lost, writer.weights)


def float_nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """The nodes that read or make a float32 value."""
    types = types_of(proto)
    for node in proto.graph.node:
        if any(types.get(name) == FLOAT for name in (*node.input, *node.output)):
            yield node


@dataclass(frozen=True)
class _Slots:
    """Which inputs and outputs of a node become half, by position."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def _kept(
    proto: onnx.ModelProto, kind: HalfKind, able: Mapping[str, _Slots], keep: Mapping[str, str]
) -> dict[str, str]:
    """The nodes that stay float32, and why."""
    front = front_nodes(proto)
    inner = set().union(*(captured(node) for node in proto.graph.node))
    large = _too_large(proto, kind)
    reasons: dict[str, str] = {}
    for node in float_nodes(proto):
        if reason := keep.get(node.name) or keep.get(node.op_type):
            reasons[node.name] = reason
        elif node.name in front:
            reasons[node.name] = "before the first convolution or matrix product"
        elif beyond := [name for name in node.input if name in large]:
            reasons[node.name] = f"{beyond[0]} holds {large[beyond[0]]:.1e}, beyond {kind}"
        elif inner.intersection(node.output):
            reasons[node.name] = "a subgraph reads it"
        elif node.name not in able:
            reasons[node.name] = f"ONNX has no {node.op_type} in {kind}"
    return reasons


def _too_large(proto: onnx.ModelProto, kind: HalfKind) -> dict[str, float]:
    """Constants with a finite value that the half type cannot hold: the largest of each."""
    found = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type == FLOAT:
            values = np.abs(numpy_helper.to_array(tensor))
            largest = float(values[np.isfinite(values)].max(initial=0.0))
            if largest > LARGEST[kind]:
                found[tensor.name] = largest
    return found


def _halved(node: onnx.NodeProto, kind: HalfKind, opset: int, types: Mapping[str, int]) -> _Slots | None:
    """What of a node becomes half by ONNX's definition of the operator; None: nothing can."""
    schema = _schema(node.op_type, node.domain, opset)
    if schema is None or captured(node):
        return None
    allowed = {rule.type_param_str: rule.allowed_type_strs for rule in schema.type_constraints}
    letters, inputs = set(), set()
    for at, name in enumerate(node.input):
        letter = _formal(schema.inputs, at).type_str
        if types.get(name) == FLOAT and _NAMES[kind] in allowed.get(letter, ()):
            letters.add(letter)
            inputs.add(at)
    # An output whose type no input decides (Cast, mean of a layer norm) stays what it is.
    outputs = {
        at
        for at, name in enumerate(node.output)
        if types.get(name) == FLOAT and _formal(schema.outputs, at).type_str in letters
    }
    return _Slots(frozenset(inputs), frozenset(outputs)) if inputs else None


@cache
def _schema(op_type: str, domain: str, opset: int) -> defs.OpSchema | None:
    try:
        return defs.get_schema(op_type, opset, domain if domain != "ai.onnx" else "")
    except defs.SchemaError:  # not a standard operator
        return None


def _formal(parameters: Sequence[defs.OpSchema.FormalParameter], at: int) -> defs.OpSchema.FormalParameter:
    """The declared parameter of a position; the last one may stand for many."""
    return parameters[min(at, len(parameters) - 1)]


class _Writer:
    """Writes the half graph node by node, and remembers in which types each value exists already."""

    def __init__(
        self, proto: onnx.ModelProto, kind: HalfKind, plan: Mapping[str, _Slots], types: Mapping[str, int]
    ) -> None:
        self.proto, self.kind, self.plan, self.types = copy_of(proto), kind, plan, types
        self.weights_of = initializers(self.proto)
        self.outputs = {value.name for value in proto.graph.output}
        self.float_name = {name: name for name, kind_of in types.items() if kind_of == FLOAT}
        self.half_name: dict[str, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.lost = self.weights = 0

    def write(self) -> onnx.ModelProto:
        for node in self.proto.graph.node:
            self._write(node, self.plan.get(node.name, _Slots(frozenset(), frozenset())))
        set_nodes(self.proto, self.nodes)
        return self.proto

    def _write(self, node: onnx.NodeProto, slots: _Slots) -> None:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        for at, name in enumerate(node.input):
            if self.types.get(name) == FLOAT:
                copied.input[at] = self._half(name) if at in slots.inputs else self._float(name)
        self.nodes.append(copied)
        for at in slots.outputs:
            name = node.output[at]
            # A graph's outputs keep their names and their type; within the graph a half value keeps its name.
            copied.output[at] = self.half_name[name] = f"{name}_{self.kind}" if name in self.outputs else name
            del self.float_name[name]
            if name in self.outputs:
                self._cast(copied.output[at], name, FLOAT)
                self.float_name[name] = name

    def _half(self, name: str) -> str:
        if name not in self.half_name:
            self.half_name[name] = f"{name}_to_{self.kind}"
            if name in self.weights_of:
                self._round(name)
            else:
                self._cast(self.float_name[name], self.half_name[name], TYPES[self.kind])
        return self.half_name[name]

    def _float(self, name: str) -> str:
        if name not in self.float_name:
            self.float_name[name] = f"{name}_to_fp32"
            self._cast(self.half_name[name], self.float_name[name], FLOAT)
        return self.float_name[name]

    def _cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(onnx.helper.make_node("Cast", [source], [target], f"cast.{target}", to=kind))

    def _round(self, name: str) -> None:
        values = numpy_helper.to_array(self.weights_of[name])
        rounded = values.astype(NUMPY[self.kind])
        self.lost += int(((values != 0) & (rounded == 0)).sum())
        self.weights += values.size
        self.proto.graph.initializer.append(numpy_helper.from_array(rounded, self.half_name[name]))
