"""Which roundings of an int8 graph its answers suffer from: one graph with a switch at every rounding.

Each switch is turned on alone, everything else in float32, and the error at the outputs is measured: one
session and one run a switch, instead of one quantised graph a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tldist.export.precision.graphs import (
    add_constant,
    consumers,
    copy_of,
    initializers,
    producers,
    set_nodes,
)
from tldist.export.precision.quantize import Plan, quantizable, quantize
from tldist.export.precision.running import open_proto
from tldist.progress import progress_bar

SWITCHES = "switches"
_ROUNDED = "_DequantizeLinear_Output"
_ACTIVATIONS = ("Relu", "Clip")
"""They disappear into the rounding of what they give: with whoever makes it, or not at all."""
_HANDED_ON = ("MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze")
"""They give their input's values, with its rounding."""


@dataclass(frozen=True)
class Rounding:
    """One rounding, and how to do without it.

    Attributes:
        name: of the value, or weight, that is rounded.
        nodes: that must stay float32 for it not to be.
        error: at the outputs, when only this is rounded: mean square, relative to their variance.
    """

    name: str
    nodes: frozenset[str]
    error: float


def roundings(plan: Plan, images: np.ndarray) -> list[Rounding]:
    """All roundings of a plan that can be done without, the most harmful first.

    Args:
        plan: what is quantised.
        images: uint8 (N, H, W, 3), a few.
    """
    proto, names = switched(plan)
    session = open_proto(proto, level="basic")
    source = plan.proto.graph.input[0].name
    outputs = [value.name for value in proto.graph.output]

    def answers(on: np.ndarray) -> list[np.ndarray]:
        return [np.asarray(v, np.float64) for v in session.run(outputs, {source: images, SWITCHES: on})]

    exact = answers(np.zeros(len(names), bool))
    found = []
    with progress_bar(len(names), "rounding", "what each rounding costs", keep=False) as bar:
        for at, name in enumerate(names):
            rounded = answers(np.arange(len(names)) == at)
            found.append((_error(exact, rounded), name))
            bar.update(1)
    without = _nodes_of(plan, names)
    distinct: dict[frozenset[str], Rounding] = {}  # before and behind a Relu it is the same one
    for error, name in sorted(found, key=lambda pair: -pair[0]):
        if without[name]:
            distinct.setdefault(without[name], Rounding(name, without[name], error))
    return list(distinct.values())


def switched(plan: Plan) -> tuple[onnx.ModelProto, list[str]]:
    """A graph with one more input, ``switches`` (bool): which roundings happen; and their names, in order."""
    made = copy_of(quantize(plan, explicit=True))
    made_by = producers(made)
    weights, constants = initializers(plan.proto), initializers(made)
    nodes: list[onnx.NodeProto] = []
    names: list[str] = []
    for node in made.graph.node:
        nodes.append(node)
        exact = _exact(node, made_by, weights, constants) if node.op_type == "DequantizeLinear" else None
        if exact is None:
            continue
        name, output = exact.removesuffix("_QuantizeLinear_Input"), node.output[0]
        if name not in names:
            names.append(name)
        if exact in weights and exact not in constants:
            made.graph.initializer.append(weights[exact])
            constants = initializers(made)
        node.output[0] = f"{output}.rounded"
        nodes += _switch(made, names.index(name), f"{output}.rounded", exact, output)
    set_nodes(made, nodes)
    made.graph.input.append(helper.make_tensor_value_info(SWITCHES, TensorProto.BOOL, [len(names)]))
    return made, names


def _exact(
    node: onnx.NodeProto,
    made_by: Mapping[str, onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
    constants: Mapping[str, onnx.TensorProto],
) -> str | None:
    """The float32 value that a DequantizeLinear gives back rounded; None for biases and pixels."""
    source = made_by.get(node.input[0])
    if source is not None:
        return source.input[0] if source.op_type == "QuantizeLinear" else None
    name = node.output[0].removesuffix(_ROUNDED)
    kind = constants[node.input[0]].data_type if node.input[0] in constants else None
    return name if name in weights and kind != TensorProto.INT32 else None


def _switch(
    proto: onnx.ModelProto, number: int, rounded: str, exact: str, output: str
) -> Iterator[onnx.NodeProto]:
    index = add_constant(proto, f"{output}.number", np.array(number, np.int64))
    yield helper.make_node("Gather", [SWITCHES, index], [f"{output}.on"], f"{output}.gather")
    yield helper.make_node("Where", [f"{output}.on", rounded, exact], [output], f"{output}.where")


def _error(exact: list[np.ndarray], rounded: list[np.ndarray]) -> float:
    return float(sum(np.square(a - b).mean() / max(float(a.var()), 1e-12) for a, b in zip(exact, rounded)))


def _nodes_of(plan: Plan, names: list[str]) -> dict[str, frozenset[str]]:
    """The nodes that must stay float32 for each rounding not to happen."""
    read_by, made_by = consumers(plan.proto), producers(plan.proto)
    known = {node.name for node in quantizable(plan)}
    weights = initializers(plan.proto)
    found = {}
    for name in names:
        nodes = set(_readers(name, read_by))
        if name not in weights:
            nodes |= set(_makers(name, made_by))
        found[name] = frozenset(nodes & known)
    return found


def _readers(name: str, read_by: Mapping[str, list[onnx.NodeProto]]) -> Iterator[str]:
    for node in read_by.get(name, ()):
        yield node.name
        if node.op_type in (*_ACTIVATIONS, *_HANDED_ON):
            yield from _readers(node.output[0], read_by)


def _makers(name: str, made_by: Mapping[str, onnx.NodeProto]) -> Iterator[str]:
    node = made_by.get(name)
    if node is not None:
        yield node.name
        if node.op_type in (*_ACTIVATIONS, *_HANDED_ON):
            yield from _makers(node.input[0], made_by)
