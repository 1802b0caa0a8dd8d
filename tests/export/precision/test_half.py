"""Half precision: what becomes half, what stays float32, and that the graph computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.support_precision import Net, node, ops, pictures, run_float
from tldist.errors import ModelError
from tldist.export.precision.graphs import copy_of, initializers, types_of, with_names
from tldist.export.precision.half import to_half
from tldist.export.precision.running import open_proto, run


def test_fp16__agrees_and_its_border_stays_as_it_was(net: onnx.ModelProto, images: np.ndarray) -> None:
    half = to_half(net, "fp16").proto
    exact = run_float(net, images[:32])
    for found in (run(open_proto(half), images[:32])["logits"], run_float(half, images[:32])):
        assert found.dtype == np.float32
        assert np.abs(found - exact).max() < 0.01 * np.abs(exact).max()
        assert np.abs(found - exact).max() > 0  # it did round
    assert [half.graph.input[0].name, half.graph.output[0].name] == ["images", "logits"]
    assert half.graph.input[0] == net.graph.input[0]
    assert half.graph.output[0] == net.graph.output[0]


def test_fp16__convolutions_compute_in_it_and_normalisation_does_not(net: onnx.ModelProto) -> None:
    half = to_half(net, "fp16")
    types = types_of(half.proto)
    for one in half.proto.graph.node:
        if one.op_type in ("Conv", "Gemm"):
            assert {types[name] for name in (*one.input, *one.output)} == {TensorProto.FLOAT16}, one.name
    front = {one.name for one in net.graph.node[1:5]}  # Cast, Div, Sub, Div
    assert front == set(half.kept)
    assert all(types[name] == TensorProto.FLOAT for one in half.proto.graph.node if one.name in front
               for name in one.output)  # fmt: skip
    weights = [t for t in half.proto.graph.initializer if t.data_type == TensorProto.FLOAT16]
    assert sum(int(np.prod(t.dims)) for t in weights) == half.weights
    casts = [one for one in half.proto.graph.node if one.op_type == "Cast"]
    assert len(casts) == 3  # uint8 to float32, into half, out of half


def test_kept_neighbours__hand_each_other_float32() -> None:
    """(x * 1000) * 1000 / 1e6: what is between the kept nodes is beyond fp16."""
    net = Net()
    x = net.pooled(net.conv(net.normalised(), 3, 4))
    large = net.add("Mul", net.add("Mul", x, net.constant(1e3), name="a"), net.constant(1e3), name="b")
    proto = with_names(net.proto(net.add("Div", large, net.constant(1e6), name="c")))
    seen = pictures(4)[0]
    exact = run_float(proto, seen)
    assert not np.isfinite(run_float(to_half(proto, "fp16").proto, seen)).all()
    half = to_half(proto, "fp16", {"a": "asked", "b": "asked", "c": "asked"})
    for found in (run(open_proto(half.proto), seen)["logits"], run_float(half.proto, seen)):
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-3 * np.abs(exact).max())
    assert half.kept["b"] == "asked"


def test_kept__by_operator_type_and_two_readers_of_one_value() -> None:
    net = Net()
    x = net.conv(net.normalised(), 3, 4)
    both = net.add("Add", net.add("Sigmoid", x), net.add("Sigmoid", x))
    proto = with_names(net.proto(net.pooled(both)))
    half = to_half(proto, "fp16", {"Sigmoid": "asked"})
    types = types_of(half.proto)
    sigmoids = [one for one in half.proto.graph.node if one.op_type == "Sigmoid"]
    assert len(sigmoids) == 2
    assert {types[one.output[0]] for one in sigmoids} == {TensorProto.FLOAT}
    seen = pictures(3)[0]
    np.testing.assert_allclose(run(open_proto(half.proto), seen)["logits"], run_float(proto, seen), atol=2e-3)


@pytest.mark.parametrize("largest", [7e4, 3e38])
def test_constant_beyond_fp16__stays_float32_and_is_said(largest: float) -> None:
    net = Net()
    x = net.conv(net.normalised(), 3, 4)
    x = net.add("Min", x, net.constant(largest), name="bound")
    half = to_half(with_names(net.proto(net.pooled(x))), "fp16")
    assert "beyond fp16" in half.kept["bound"]
    assert all(np.isfinite(numpy_helper.to_array(t)).all() for t in half.proto.graph.initializer)


def test_infinite_constant__is_one_in_fp16_too() -> None:
    net = Net()
    x = net.add("Max", net.conv(net.normalised(), 3, 4), net.constant(-np.inf), name="bound")
    assert "bound" not in to_half(with_names(net.proto(net.pooled(x))), "fp16").kept


def test_lost_weights__are_counted(net: onnx.ModelProto) -> None:
    small = copy_of(net)
    stem = initializers(small)[node(small, "stem").input[1]]
    weight = numpy_helper.to_array(stem).copy()
    weight.flat[:5] = [1e-9, -1e-8, 0.0, 2e-8, 1e-4]  # 2^-25 (3e-8) and less round to 0
    stem.CopyFrom(numpy_helper.from_array(weight, stem.name))
    assert to_half(small, "fp16").lost == to_half(net, "fp16").lost + 3


def test_value_that_a_subgraph_reads__stays_float32() -> None:
    net = Net()
    x = net.add("Relu", net.conv(net.normalised(), 3, 4), name="outer")
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", [x, x], ["twice"])],
        "inner", [], [onnx.helper.make_tensor_value_info("twice", TensorProto.FLOAT, None)],
    )  # fmt: skip
    x = net.add("If", net.constant(True, np.bool_), then_branch=inner, else_branch=inner)
    proto = with_names(net.proto(net.pooled(x)))
    half = to_half(proto, "fp16")
    assert half.kept["outer"] == "a subgraph reads it"
    seen = pictures(3)[0]
    np.testing.assert_allclose(run(open_proto(half.proto), seen)["logits"], run_float(proto, seen), atol=2e-2)


def bf16_by_hand(values: np.ndarray) -> np.ndarray:
    """The upper 16 bits of float32, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_net() -> onnx.ModelProto:
    net = Net()
    return with_names(net.proto(net.pooled(net.add("Relu", net.conv(net.normalised(), 3, 4))), opset=22))


def test_bf16__is_valid_and_its_weights_are_rounded_to_nearest() -> None:
    proto = bf16_net()
    half = to_half(proto, "bf16").proto
    onnx.checker.check_model(half, full_check=True)
    types = types_of(half)
    conv = next(one for one in half.graph.node if one.op_type == "Conv")
    assert {types[name] for name in (*conv.input, *conv.output)} == {TensorProto.BFLOAT16}
    assert types["logits"] == TensorProto.FLOAT
    before = next(one for one in proto.graph.node if one.op_type == "Conv")
    for old, new in zip(before.input[1:], conv.input[1:]):
        rounded = np.frombuffer(initializers(half)[new].raw_data, np.uint16)
        expected = bf16_by_hand(numpy_helper.to_array(initializers(proto)[old]))
        np.testing.assert_array_equal(rounded, expected.ravel())


def test_bf16__computes_the_same_by_the_reference_implementation() -> None:
    proto, seen = bf16_net(), pictures(2)[0]
    exact = run_float(proto, seen)
    found = run_float(to_half(proto, "bf16", {"ReduceMean": "NumPy adds up bf16 badly"}).proto, seen)
    assert np.abs(found - exact).max() < 0.05 * np.abs(exact).max()


def test_bf16__needs_an_operator_set_that_has_it(net: onnx.ModelProto) -> None:
    with pytest.raises(ModelError, match="operator set 22 or later, and the graph has 20"):
        to_half(net, "bf16")


def test_nothing_to_convert__is_an_error() -> None:
    net = Net()
    with pytest.raises(ModelError, match="no convolution and no matrix product"):
        to_half(with_names(net.proto(net.pooled(net.normalised()), width=3)), "fp16")


def test_unnamed_nodes__get_names(net: onnx.ModelProto) -> None:
    bare = copy_of(net)
    for one in bare.graph.node:
        one.name = ""
    named = with_names(bare)
    assert len({one.name for one in named.graph.node}) == len(named.graph.node)
    assert ops(named) == ops(net)
    assert to_half(named, "fp16").lowered == to_half(net, "fp16").lowered
