"""Small questions about ONNX graphs: who makes a value, who reads it, what type it has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from onnx import numpy_helper

from tldist.errors import ModelError

LARGEST = 2**31 - 2**24
"""Bytes of a graph that protobuf can hold in one message (2 GiB), with room for what is added."""
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Attention"})
"""Operators that cost nearly all of the time: convolutions and matrix products."""
FLOAT = onnx.TensorProto.FLOAT


def copy_of(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that may be changed."""
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


def size_of(proto: onnx.ModelProto) -> int:
    """Bytes of the weights (also above 2 GiB, where protobuf cannot count) and of the nodes."""
    weights = sum(len(tensor.raw_data) or tensor.ByteSize() for tensor in proto.graph.initializer)
    return weights + sum(node.ByteSize() for node in proto.graph.node)


def is_whole(proto: onnx.ModelProto) -> bool:
    """Whether all of it is in memory and fits one message, so that it can be changed and run from memory."""
    outside = any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)
    return not outside and size_of(proto) < LARGEST


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of the standard operators."""
    return next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def with_names(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which every node has a name of its own, and every value inside a type and a shape."""
    named = copy_of(proto)
    taken = Counter(node.name for node in named.graph.node)
    for number, node in enumerate(named.graph.node):
        if not node.name or taken[node.name] > 1:
            node.name = f"{node.name or node.op_type}.{number}"
    return onnx.shape_inference.infer_shapes(named, data_prop=True)


def producers(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each value."""
    return {name: node for node in proto.graph.node for name in node.output if name}


def consumers(proto: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each value, those with a subgraph that reads it among them."""
    found: dict[str, list[onnx.NodeProto]] = {}
    for node in proto.graph.node:
        for name in dict.fromkeys((*node.input, *captured(node))):
            if name:
                found.setdefault(name, []).append(node)
    return found


def captured(node: onnx.NodeProto) -> set[str]:
    """The outer values that the subgraphs of a node (If, Loop, Scan) may read, by name."""
    return {
        name
        for attribute in node.attribute
        for graph in (attribute.g, *attribute.graphs)
        for inner in graph.node
        for name in (*inner.input, *captured(inner), *(output.name for output in graph.output))
        if name
    }


def initializers(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The constants, by name."""
    return {tensor.name: tensor for tensor in proto.graph.initializer}


def types_of(proto: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value that has one."""
    graph = proto.graph
    found = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        found[value.name] = value.type.tensor_type.elem_type
    return {name: kind for name, kind in found.items() if kind}


def shape_of(proto: onnx.ModelProto, name: str) -> tuple[int | None, ...] | None:
    """The sizes of a value, None for those that are free; None where even their number is not known."""
    graph = proto.graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.name == name and value.type.tensor_type.HasField("shape"):
            sides = value.type.tensor_type.shape.dim
            return tuple(side.dim_value if side.HasField("dim_value") else None for side in sides)
    return None


def front_nodes(proto: onnx.ModelProto) -> set[str]:
    """Names of the nodes before the first convolution or matrix product: they normalise (resize, crop)."""
    behind: set[str] = set()  # values that depend on a weighted node
    front = set()
    for node in proto.graph.node:
        if node.op_type in WEIGHTED or behind.intersection((*node.input, *captured(node))):
            behind.update(node.output)
        else:
            front.add(node.name)
    return front


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """An attribute's value."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def constant(proto: onnx.ModelProto, name: str) -> np.ndarray | None:
    """The value of an initializer; None where the name is none."""
    tensor = initializers(proto).get(name)
    return None if tensor is None else numpy_helper.to_array(tensor)


def add_constant(proto: onnx.ModelProto, name: str, value: np.ndarray) -> str:
    """Add an initializer; gives back its name."""
    proto.graph.initializer.append(numpy_helper.from_array(value, name))
    return name


def set_nodes(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Replace all nodes, then drop what nothing reads any more."""
    kept = list(nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    _drop_unread(proto)


def _drop_unread(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    read = {output.name for output in graph.output}
    alive: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            read.update(node.input, captured(node))
            alive.append(node)
    weights = [tensor for tensor in graph.initializer if tensor.name in read]
    inside = [value for value in graph.value_info if value.name in read]
    for field, left in ((graph.node, alive[::-1]), (graph.initializer, weights), (graph.value_info, inside)):
        if len(left) < len(field):
            del field[:]
            field.extend(left)


def checked(proto: onnx.ModelProto, what: str) -> onnx.ModelProto:
    """The same graph, with new types and shapes of its values, after ONNX's own check of its structure.

    Raises:
        ModelError: its structure is wrong.
    """
    del proto.graph.value_info[:]
    try:
        proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
        onnx.checker.check_model(proto, full_check=True)
    except Exception as error:  # the checker's own class, and those of shape inference
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the {what} graph is not valid ONNX: {reason}") from error
    return proto


def float_outputs(proto: onnx.ModelProto) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Every node with each float32 value that it makes, in order."""
    types = types_of(proto)
    for node in proto.graph.node:
        yield from ((node, name) for name in node.output if types.get(name) == FLOAT)
