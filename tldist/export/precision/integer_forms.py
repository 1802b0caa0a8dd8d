"""Operators without an int8 kernel in ONNX Runtime, said in ones that have it: pooling and hard-swish.

A float operator between two int8 convolutions costs four passes over memory (to float, itself, to int8, and
the loss of a fused kernel). Each rewriting here computes the same function.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from tldist.export.precision.graphs import (
    add_constant,
    attribute,
    constant,
    consumers,
    copy_of,
    producers,
    set_nodes,
    shape_of,
)

_SPATIAL = ({2, 3}, {-1, -2})


def with_pooling(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """The mean over positions (ReduceMean) as GlobalAveragePool, which has an int8 kernel; and how many."""
    changed, count = copy_of(proto), 0
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        if not _is_spatial_mean(proto, node):
            nodes.append(node)
            continue
        count += 1
        keeps = attribute(node, "keepdims", 1)
        pooled = node.output[0] if keeps else f"{node.output[0]}.pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], node.name))
        if not keeps:
            nodes.append(helper.make_node("Flatten", [pooled], [node.output[0]], f"{node.name}.flat", axis=1))
    set_nodes(changed, nodes)
    return onnx.shape_inference.infer_shapes(changed, data_prop=True), count


def _is_spatial_mean(proto: onnx.ModelProto, node: onnx.NodeProto) -> bool:
    if node.op_type != "ReduceMean" or len(shape_of(proto, node.input[0]) or ()) != 4 or len(node.input) < 2:
        return False
    axes = constant(proto, node.input[1])
    return axes is not None and set(axes.tolist()) in _SPATIAL


def with_plain_swish(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Hard-swish as x * hard-sigmoid(x), its definition: so that the product can be an int8 one."""
    changed = copy_of(proto)
    nodes: list[onnx.NodeProto] = []
    for node in changed.graph.node:
        if node.op_type != "HardSwish":
            nodes.append(node)
            continue
        source, gate = node.input[0], f"{node.output[0]}.gate"
        nodes.append(
            helper.make_node("HardSigmoid", [source], [gate], f"{node.name}.gate", alpha=1 / 6, beta=0.5)
        )
        nodes.append(helper.make_node("Mul", [source, gate], [node.output[0]], node.name))
    set_nodes(changed, nodes)
    return onnx.shape_inference.infer_shapes(changed, data_prop=True)


def with_integer_gates(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    """In a quantised graph: hard-sigmoid between uint8 values as an addition that saturates; and how many.

    hard-sigmoid(x) = min(max(alpha x + beta, 0), 1). With the output's step at 1/255 and its zero at 0, the
    uint8 range is [0, 1]: the rounding of an integer addition clips by itself. ``alpha`` goes into the step
    of the input. ONNX Runtime runs it as QLinearAdd, with no float value in memory.
    """
    changed = copy_of(proto)
    read_by, made_by = consumers(changed), producers(changed)
    gates = [
        node
        for node in changed.graph.node
        if _is_integer_gate(node, read_by, made_by) and _is_uint8(changed, made_by[node.input[0]])
    ]
    if not gates:
        return changed, 0
    one = add_constant(changed, "gates.one", np.array(255, np.uint8))
    zero = add_constant(changed, "gates.zero", np.array(0, np.uint8))
    step = add_constant(changed, "gates.step", np.array(1 / 255, np.float32))
    replaced: dict[str, list[onnx.NodeProto]] = {}
    for node in gates:
        replaced[node.name] = _integer_gate(changed, node, made_by[node.input[0]], one, zero)
        (quantize,) = read_by[node.output[0]]
        for other in (quantize, *read_by[quantize.output[0]]):
            other.input[1], other.input[2] = step, zero
    set_nodes(changed, [new for node in changed.graph.node for new in replaced.get(node.name, [node])])
    return changed, len(gates)


def _is_integer_gate(
    node: onnx.NodeProto, read_by: dict[str, list[onnx.NodeProto]], made_by: dict[str, onnx.NodeProto]
) -> bool:
    """Whether a node is a hard-sigmoid from DequantizeLinear to QuantizeLinear, read by nothing else."""
    if node.op_type != "HardSigmoid" or node.input[0] not in made_by:
        return False
    readers = read_by.get(node.output[0], [])
    if made_by[node.input[0]].op_type != "DequantizeLinear" or len(readers) != 1:
        return False
    (reader,) = readers
    after = read_by.get(reader.output[0], [])
    return reader.op_type == "QuantizeLinear" and all(one.op_type == "DequantizeLinear" for one in after)


def _is_uint8(proto: onnx.ModelProto, dequantize: onnx.NodeProto) -> bool:
    zero = constant(proto, dequantize.input[2]) if len(dequantize.input) > 2 else None
    return zero is not None and zero.dtype == np.uint8


def _integer_gate(
    proto: onnx.ModelProto, node: onnx.NodeProto, source: onnx.NodeProto, one: str, zero: str
) -> list[onnx.NodeProto]:
    alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))  # type: ignore[arg-type]
    name, step = node.name, constant(proto, source.input[1])
    assert step is not None  # static quantisation makes every step a constant
    scaled = add_constant(proto, f"{name}.step", np.asarray(step * alpha, np.float32))
    shift = add_constant(proto, f"{name}.shift", np.array(beta / 255, np.float32))
    chain = (
        ("DequantizeLinear", [source.input[0], scaled, source.input[2]], f"{name}.scaled"),
        ("DequantizeLinear", [one, shift, zero], f"{name}.beta"),
        ("Add", [f"{name}.scaled", f"{name}.beta"], node.output[0]),
    )
    return [
        helper.make_node(op, ins, [out], f"{name}.{number}") for number, (op, ins, out) in enumerate(chain)
    ]
