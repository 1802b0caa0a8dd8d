"""What is rewritten for int8 computes the same function in float32, or is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.support_precision import MEAN, STD, Net, ops, run_float
from tldist.export.precision.graphs import constant, consumers, with_names
from tldist.export.precision.integer_forms import with_integer_gates, with_plain_swish, with_pooling
from tldist.export.precision.integer_input import SHIFTED, with_integer_input
from tldist.export.precision.running import observe, open_proto, run


def noise(count: int = 3, side: int = 24) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.mark.parametrize(("stride", "size"), [(1, 1), (2, 3), (2, 7)])
def test_integer_input__computes_the_same(stride: int, size: int) -> None:
    """Borders too, where a convolution pads with the mean colour."""
    net = Net()
    proto = with_names(net.proto(net.pooled(net.conv(net.normalised(), 3, 4, size, stride=stride))))
    found = with_integer_input(proto)
    assert found is not None
    onnx.checker.check_model(found.proto, full_check=True)
    assert "Sub" not in ops(found.proto)
    for images in (noise(), np.zeros((2, 24, 24, 3), np.uint8), np.full((1, 24, 24, 3), 255, np.uint8)):
        expected = run_float(proto, images)
        for answer in (run_float(found.proto, images), run(open_proto(found.proto), images)["logits"]):
            np.testing.assert_allclose(answer, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_integer_input__its_range_is_what_pixels_can_give() -> None:
    """x / 255 - mean over all channels: from -max(mean) to 1 - min(mean)."""
    net = Net()
    found = with_integer_input(with_names(net.proto(net.pooled(net.conv(net.normalised(), 3, 4)))))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((-max(MEAN), 1 - min(MEAN)), abs=1e-6)
    extremes = np.stack([np.zeros((24, 24, 3), np.uint8), np.full((24, 24, 3), 255, np.uint8)])
    seen = observe(found.proto, extremes, [SHIFTED])[SHIFTED]
    assert (float(seen.min()), float(seen.max())) == pytest.approx((found.low, found.high), abs=1e-6)
    assert set(STD) != {1.0}


def other_front(kind: str) -> onnx.ModelProto:
    net = Net()
    if kind == "free width":
        return net.proto(net.pooled(net.conv(net.normalised(), 3, 4)), side=None)
    if kind == "grouped":
        return net.proto(net.pooled(net.conv(net.normalised(), 3, 3, group=3)), width=3)
    x = net.normalised()
    if kind == "squared":
        x = net.add("Mul", x, x)
    elif kind == "gamma":
        x = net.add("Sqrt", net.add("Abs", x))
    elif kind == "by position":
        x = net.add("Mul", x, net.constant(np.linspace(1, 2, 24)))
    elif kind == "read twice":
        return net.proto(net.pooled(net.add("Add", net.conv(x, 3, 3, name="a"), x)), width=3)
    return net.proto(net.pooled(net.conv(x, 3, 4)))


@pytest.mark.parametrize("kind", ["free width", "grouped", "squared", "gamma", "by position", "read twice"])
def test_integer_input__leaves_other_graphs_alone(kind: str) -> None:
    assert with_integer_input(with_names(other_front(kind))) is None


@pytest.mark.parametrize("keepdims", [0, 1])
def test_pooling__computes_the_same(keepdims: int) -> None:
    net = Net()
    x = net.pooled(net.conv(net.normalised(), 3, 4), keepdims)
    x = x if not keepdims else net.add("Reshape", x, net.constant([0, -1], np.int64))
    proto = with_names(net.proto(x))
    changed, count = with_pooling(proto)
    assert count == 1
    assert "ReduceMean" not in ops(changed)
    onnx.checker.check_model(changed, full_check=True)
    np.testing.assert_allclose(run_float(changed, noise()), run_float(proto, noise()), atol=1e-6)


def test_pooling__leaves_other_means_alone() -> None:
    net = Net()
    x = net.conv(net.normalised(), 3, 4)
    rows = net.add("ReduceMean", x, net.constant([2], np.int64), keepdims=1)
    x = net.add("ReduceMean", rows, net.constant([2, 3], np.int64), keepdims=0)
    changed, count = with_pooling(with_names(net.proto(x)))
    assert (count, ops(changed).count("ReduceMean")) == (1, 1)


def test_plain_swish__computes_the_same(net: onnx.ModelProto, images: np.ndarray) -> None:
    changed = with_plain_swish(net)
    assert "HardSwish" not in ops(changed)
    np.testing.assert_allclose(run_float(changed, images[:8]), run_float(net, images[:8]), atol=1e-6)


def gate_graph(alpha: float, beta: float, step: float, zero: int, kind: type = np.uint8) -> onnx.ModelProto:
    """uint8 codes as images, through one gate between int8 values."""
    net = Net()
    codes = net.add("Reshape", "images", net.constant([0, 1728], np.int64))
    if kind is np.int8:
        codes = net.add("Cast", net.add("Sub", net.add("Cast", codes, to=TensorProto.INT32),
                                        net.constant(128, np.int32)), to=TensorProto.INT8)  # fmt: skip
    pair = net.constant(np.float32(step)), net.constant(zero, kind)
    x = net.add("HardSigmoid", net.add("DequantizeLinear", codes, *pair), name="gate", alpha=alpha, beta=beta)
    out = net.constant(np.float32(0.9 / 255)), net.constant(3, kind)
    x = net.add("DequantizeLinear", net.add("QuantizeLinear", x, *out), *out)
    return with_names(net.proto(x, width=1728))


@pytest.mark.parametrize(
    ("alpha", "beta", "step", "zero"), [(1 / 6, 0.5, 0.05, 130), (0.2, 0.5, 0.02, 0), (0.5, 0.25, 0.1, 200)]
)
def test_integer_gates__are_hard_sigmoid_to_one_step(
    alpha: float, beta: float, step: float, zero: int
) -> None:
    proto = gate_graph(alpha, beta, step, zero)
    changed, count = with_integer_gates(proto)
    assert count == 1
    assert "HardSigmoid" not in ops(changed)
    onnx.checker.check_model(changed, full_check=True)
    images = noise()
    x = (images.reshape(3, -1).astype(np.float64) - zero) * step
    expected = np.clip(alpha * x + beta, 0, 1)
    assert (expected == 0).any() or (expected == 1).any()
    for found in (run_float(changed, images), run(open_proto(changed), images)["logits"]):
        assert np.abs(found - expected).max() <= 1.01 / 255


def test_integer_gates__leave_int8_and_float_alone(net: onnx.ModelProto) -> None:
    assert with_integer_gates(gate_graph(1 / 6, 0.5, 0.05, 0, np.int8))[1] == 0
    assert with_integer_gates(with_plain_swish(net))[1] == 0


def test_integer_gates__leave_a_gate_that_is_read_in_float_alone() -> None:
    proto = gate_graph(1 / 6, 0.5, 0.05, 130)
    gate = next(one for one in proto.graph.node if one.op_type == "HardSigmoid")
    proto.graph.output.append(helper.make_tensor_value_info("also", TensorProto.FLOAT, None))
    proto.graph.node.append(helper.make_node("Relu", [gate.output[0]], ["also"], "reader"))
    assert len(consumers(proto)[gate.output[0]]) == 2
    assert with_integer_gates(proto)[1] == 0
    assert constant(proto, "no such") is None
