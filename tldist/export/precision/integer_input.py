"""Normalisation in whole numbers, for int8 on a CPU: one addition on bytes, not four passes over floats.

A graph normalises (x / 255 - mean) / std in float32 and then rounds to int8. Behind ONNX Runtime's reordering
for its int8 convolutions, that costs as much as the whole of a small network. The same function is
``std' * ((x - zero) / 255 + shift)`` with one ``zero`` for all channels: the first factor goes into the first
convolution's weights, x - zero is exact in uint8, and an integer kernel adds ``shift`` (within 0.1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tldist.export.precision.graphs import (
    FLOAT,
    add_constant,
    consumers,
    copy_of,
    opset_of,
    producers,
    set_nodes,
    shape_of,
    types_of,
)
from tldist.export.precision.running import observe

PREFIX = "input."
"""Begins the names of what this module adds."""
PIXELS = f"{PREFIX}pixels"
SHIFTED = f"{PREFIX}shifted"
"""The bracket of the formula: the value that is quantised, whatever the images, to all it can be."""
_MOVES = ("Cast", "Transpose", "Identity", "Div", "Sub", "Mul", "Add")
_NEAR = 1e-5


@dataclass(frozen=True)
class IntegerInput:
    """A graph whose normalisation was rewritten.

    Attributes:
        proto: the graph, in float32 still; `PIXELS` comes out of a DequantizeLinear.
        low, high: least and largest possible value of `SHIFTED`.
    """

    proto: onnx.ModelProto
    low: float
    high: float


@dataclass(frozen=True)
class _Front:
    """What lies between the pixels and the first convolution: y = scale * x + offset, channel by channel."""

    pixels: str
    width: int
    conv: onnx.NodeProto
    value: str
    scale: np.ndarray
    offset: np.ndarray


def with_integer_input(proto: onnx.ModelProto) -> IntegerInput | None:
    """Rewrite the normalisation.

    Args:
        proto: float32, with names and types (`with_names`).

    Returns:
        None where the graph is of another kind: a free width, no first convolution over 3 channels, or
        something else than a channel-wise normalisation before it (found by running it).
    """
    front = _front(proto)
    if front is None:
        return None
    changed = copy_of(proto)
    zero = int(np.clip(np.rint(-(front.offset / front.scale).mean()), 0, 255))
    shift = (front.offset / front.scale + zero) / 255
    weight = numpy_helper.to_array(next(t for t in proto.graph.initializer if t.name == front.conv.input[1]))
    scaled = weight.astype(np.float64) * (front.scale * 255)[:, None, None]
    add_constant(changed, f"{PREFIX}weight", scaled.astype(np.float32))
    nodes = _nodes(changed, front, zero, shift)
    for node in changed.graph.node:
        if node.name == front.conv.name:
            node.input[0], node.input[1] = f"{PREFIX}normal", f"{PREFIX}weight"
    at = next(i for i, node in enumerate(changed.graph.node) if node.name == front.conv.name)
    set_nodes(changed, [*list(changed.graph.node)[:at], *nodes, *list(changed.graph.node)[at:]])
    low, high = (float(side + shift.min()) for side in (-zero / 255, 0.0))
    high = float((255 - zero) / 255 + shift.max())
    return IntegerInput(onnx.shape_inference.infer_shapes(changed, data_prop=True), low, high)


def _nodes(proto: onnx.ModelProto, front: _Front, zero: int, shift: np.ndarray) -> list[onnx.NodeProto]:
    """Rows of pixels as one long axis, so that the addition runs over memory in order."""
    width = front.width
    row = add_constant(proto, f"{PREFIX}row", np.array([0, 0, 3 * width], np.int64))
    image = add_constant(proto, f"{PREFIX}image", np.array([0, 0, width, 3], np.int64))
    step = add_constant(proto, f"{PREFIX}step", np.array(1 / 255, np.float32))
    start = add_constant(proto, f"{PREFIX}zero", np.array(zero, np.uint8))
    tiled = add_constant(proto, f"{PREFIX}shift", np.tile(shift, width).astype(np.float32))
    chain = (
        ("Reshape", [front.pixels, row], f"{PREFIX}rows"),
        ("DequantizeLinear", [f"{PREFIX}rows", step, start], PIXELS),
        ("Add", [PIXELS, tiled], SHIFTED),
        ("Reshape", [SHIFTED, image], f"{PREFIX}images"),
    )
    nodes = [helper.make_node(op, sources, [made], f"{made}.node") for op, sources, made in chain]
    last = f"{PREFIX}normal"
    turned = helper.make_node("Transpose", [f"{PREFIX}images"], [last], f"{last}.node", perm=[0, 3, 1, 2])
    return [*nodes, turned]


def _front(proto: onnx.ModelProto) -> _Front | None:
    """The front of a graph, if it is one that can be rewritten."""
    conv = next((node for node in proto.graph.node if node.op_type == "Conv"), None)
    if conv is None:
        return None
    weight = next((t for t in proto.graph.initializer if t.name == conv.input[1]), None)
    if weight is None or list(weight.dims)[1:2] != [3] or len(weight.dims) != 4:
        return None
    pixels = _walk_back(proto, conv.input[0])
    shape = shape_of(proto, pixels) if pixels else None
    if pixels is None or shape is None or len(shape) != 4 or shape[3] != 3 or shape[2] is None:
        return None
    if consumers(proto)[conv.input[0]] != [conv]:
        return None
    found = _channelwise(proto, pixels, conv.input[0], shape)
    return None if found is None else _Front(pixels, shape[2], conv, conv.input[0], *found)


def _walk_back(proto: onnx.ModelProto, value: str) -> str | None:
    """The uint8 (batch, H, W, 3) value that a chain of simple nodes makes ``value`` from."""
    made_by, types = producers(proto), types_of(proto)
    constants = {tensor.name for tensor in proto.graph.initializer}
    while value in made_by and made_by[value].op_type in _MOVES:
        sources = [name for name in made_by[value].input if name not in constants]
        if len(sources) != 1:
            return None
        (value,) = sources
    return value if types.get(value) == onnx.TensorProto.UINT8 else None


def _channelwise(
    proto: onnx.ModelProto, pixels: str, value: str, shape: tuple[int | None, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and offset (3,) of y = scale * x + offset, float64; None where it is another function."""
    height = shape[1] or 16
    part = _between(proto, pixels, value, (1, height, int(shape[2] or 0), 3))
    size = (1, height, int(shape[2] or 0), 3)
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    black, white, found = (
        observe(part, images, [value])[value].astype(np.float64)
        for images in (np.zeros(size, np.uint8), np.full(size, 255, np.uint8), noise)
    )
    if found.shape != (1, 3, *size[1:3]):
        return None
    offset, scale = black[0, :, 0, 0], (white - black)[0, :, 0, 0] / 255
    expected = scale[:, None, None] * noise[0].transpose(2, 0, 1) + offset[:, None, None]
    if (scale == 0).any() or np.abs(found[0] - expected).max() > _NEAR * np.abs(expected).max():
        return None
    return scale, offset


def _between(proto: onnx.ModelProto, source: str, value: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """The part of a graph from one value to another, as a graph."""
    part = copy_of(proto)
    taken = helper.make_tensor_value_info(source, onnx.TensorProto.UINT8, shape)
    given = helper.make_tensor_value_info(value, FLOAT, None)
    for field, one in ((part.graph.input, taken), (part.graph.output, given)):
        del field[:]
        field.append(one)
    del part.graph.value_info[:]
    set_nodes(part, [node for node in part.graph.node if source not in node.output])
    assert opset_of(part) == opset_of(proto)
    return part
