"""int8: ranges, the graph, its accuracy, and the layers that are left in float32 for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.support_precision import Net, agree, fitted, node, ops, pictures, run_float
from tldist.errors import CheckFailed
from tldist.export.precision.closeness import closeness
from tldist.export.precision.exclude import within_budget
from tldist.export.precision.graphs import copy_of, initializers, producers, types_of, with_names
from tldist.export.precision.integer_forms import with_plain_swish, with_pooling
from tldist.export.precision.integer_input import PIXELS, SHIFTED, with_integer_input
from tldist.export.precision.quantize import Plan, calibrate, operator_types, quantizable, quantize
from tldist.export.precision.running import observe, open_proto, run
from tldist.export.precision.sensitivity import roundings, switched
from tldist.export.profile import Quantization
from tldist.runtime.session import CPU

HOW = Quantization()
CALIBRATION = pictures(48, seed=5)[0]


def plan_of(proto: onnx.ModelProto, how: Quantization = HOW, images: np.ndarray = CALIBRATION) -> Plan:
    """All rewritings on."""
    plain = with_plain_swish(proto)
    ranges = calibrate(plain, how, images)
    border = with_integer_input(with_pooling(plain)[0])
    assert border is not None
    return Plan(border.proto, ranges, how, CPU, border, gates=True)


@pytest.fixture(scope="session")
def plan(net: onnx.ModelProto) -> Plan:
    """Of the fitted network."""
    return plan_of(net)


def flips(expected: np.ndarray, images: np.ndarray, most: int):  # type: ignore[no-untyped-def]
    """Why a graph is not good enough: more than ``most`` flipped decisions."""

    def within(proto: onnx.ModelProto) -> str:
        found = run(open_proto(proto), images)["logits"]
        flipped = int((found.argmax(1) != expected.argmax(1)).sum())
        return f"{flipped} of {len(images)} decisions flip" if flipped > most else ""

    return within


# -- ranges ---------------------------------------------------------------------------------------------


def test_minmax__is_the_least_and_the_largest(net: onnx.ModelProto) -> None:
    from tests.support_precision import watch

    ranges = calibrate(net, HOW, CALIBRATION)  # 48 images in batches of 4
    names = ["stem.out", "depthwise.out", "project.out"]
    for name, values in watch(net, CALIBRATION, names).items():
        found = [float(side.item()) for side in ranges[name].range_value]
        assert found == pytest.approx([float(values.min()), float(values.max())], rel=1e-4)


@pytest.mark.parametrize(
    "how", [Quantization(method="percentile", percentile=90), Quantization(method="entropy")]
)
def test_other_methods__cut_tails(net: onnx.ModelProto, how: Quantization) -> None:
    widths = []
    for one in (HOW, how):
        low, high = calibrate(net, one, CALIBRATION[:16])["stem.out"].range_value
        widths.append(float(np.ravel(high)[0]) - float(np.ravel(low)[0]))
    assert 0 < widths[1] < widths[0]


def test_symmetric__for_int8_activations(net: onnx.ModelProto) -> None:
    low, high = calibrate(net, Quantization(activation="int8"), CALIBRATION[:8])["stem.out"].range_value
    assert float(low.item()) == -float(high.item())


# -- the graph ------------------------------------------------------------------------------------------


def test_int8__agrees_with_float32(plan: Plan, images: np.ndarray, logits: np.ndarray) -> None:
    made = quantize(plan)
    found = run(open_proto(made), images)["logits"]
    assert agree(found, logits) >= 0.98
    assert np.abs(found - logits).mean() < 0.1 * np.abs(logits).max()
    by_reference = run_float(made, images[:8])  # NumPy, node by node: not ONNX Runtime's fused kernels
    assert np.abs(by_reference - found[:8]).max() < 0.1 * np.abs(logits).max()


def test_int8__weights_and_values_have_the_types_of_the_profile(plan: Plan) -> None:
    made = quantize(plan)
    types, made_by, constants = types_of(made), producers(made), initializers(made)
    convolutions = [one for one in made.graph.node if one.op_type == "Conv"]
    assert len(convolutions) == 6
    for one in convolutions:
        value, weight = (made_by[name] for name in one.input[:2])
        assert (value.op_type, weight.op_type) == ("DequantizeLinear", "DequantizeLinear")
        assert types[value.input[0]] == TensorProto.UINT8
        stored = numpy_helper.to_array(constants[weight.input[0]])
        assert stored.dtype == np.int8
        assert numpy_helper.to_array(constants[weight.input[1]]).shape == (len(stored),)  # a step per channel
        assert (
            np.abs(stored.reshape(len(stored), -1).astype(int)).max(1).min() >= 126
        )  # all of the range used
    assert {one.domain for one in made.graph.node} == {""}
    assert [entry.domain for entry in made.opset_import] == [""]
    assert made.graph.input[0] == plan.proto.graph.input[0]


def test_int8__pixels_are_not_rounded_again_and_extremes_fit(plan: Plan) -> None:
    made = quantize(plan)
    (reader,) = [one for one in made.graph.node if PIXELS in one.input]
    assert reader.op_type == "Add"
    rounded = next(one.output[0] for one in made.graph.node if one.name == f"{SHIFTED}_DequantizeLinear")
    for value in (0, 255):  # calibration saw neither
        image = np.full((1, 24, 24, 3), value, np.uint8)
        exact = observe(plan.proto, image, [SHIFTED])[SHIFTED]
        found = observe(made, image, [rounded])[rounded]
        assert np.abs(exact - found).max() < 1.1 / 255
        assert np.isfinite(run(open_proto(made), image)["logits"]).all()


def test_int8__logits_are_not_of_256_levels(plan: Plan, images: np.ndarray) -> None:
    made = quantize(plan)
    assert producers(made)["logits"].op_type in ("Identity", "Gemm")
    assert node(made, "head").op_type == "Gemm"
    assert "QuantizeLinear" not in {one.op_type for one in made.graph.node if "head.out" in one.input}


@pytest.mark.parametrize("how", [
    Quantization(per_channel=False), Quantization(reduce_range=True), Quantization(activation="int8"),
])  # fmt: skip
def test_int8__settings_reach_the_graph(net: onnx.ModelProto, how: Quantization) -> None:
    plain = with_plain_swish(net)
    made = quantize(Plan(plain, calibrate(plain, how, CALIBRATION[:8]), how, CPU))
    types, made_by, constants = types_of(made), producers(made), initializers(made)
    stem = node(made, "stem")
    value, weight = (made_by[name] for name in stem.input[:2])
    stored = numpy_helper.to_array(constants[weight.input[0]])
    assert numpy_helper.to_array(constants[weight.input[1]]).ndim == int(how.per_channel)
    assert np.abs(stored.astype(int)).max() <= (64 if how.reduce_range else 127)
    kind = TensorProto.INT8 if how.activation == "int8" else TensorProto.UINT8
    assert types[value.input[0]] == kind


def test_exclude_of_the_profile__stays_float32(net: onnx.ModelProto) -> None:
    plan = plan_of(net, Quantization(exclude=("project", "Add")), CALIBRATION[:8])
    made = quantize(plan)
    assert not {"project"} & {one.name for one in quantizable(plan)}
    assert node(made, "project").input[1] == node(net, "project").input[1]  # its float32 weight


def test_transformers__only_matrix_products(net: onnx.ModelProto) -> None:
    assert "Add" in operator_types(net)
    normed = copy_of(net)
    normed.graph.node.add(op_type="LayerNormalization", name="norm")
    assert operator_types(normed) == ("Conv", "ConvTranspose", "Gemm", "MatMul")


# -- layers left in float32 -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def sensitive() -> onnx.ModelProto:
    """A network with one channel, of no influence, that is thousands of times larger than its neighbours.

    Float32 does not mind; eight bits for all channels leave nothing of the others.
    """
    net = Net()
    value = net.add("Relu", net.conv(net.normalised(), 3, 16, 3, "stem", stride=2))
    value = net.add("Relu", net.conv(value, 16, 16, 1, "outlier"))
    value = net.add("Relu", net.conv(value, 16, 16, 3, "after"))
    value = net.add("Relu", net.conv(value, 16, 16, 1, "later"))
    for name, axis, factor in (("outlier", 0, 3000.0), ("after", 1, 1e-6)):
        conv = next(one for one in net.nodes if one.name == name)
        for source in conv.input[1 : 3 - axis]:
            weight = next(one for one in net.weights if one.name == source)
            values = numpy_helper.to_array(weight).copy()
            values[(slice(None),) * axis + (5,)] *= factor
            weight.CopyFrom(numpy_helper.from_array(values, source))
    return with_names(fitted(net, net.pooled(value)))


def test_planted_sensitive_layer__is_found(sensitive: onnx.ModelProto, images: np.ndarray) -> None:
    exact = run(open_proto(sensitive), images)["logits"]
    plan = plan_of(sensitive)
    within = flips(exact, images, 2)
    assert within(quantize(plan))  # without exclusions it is not good enough
    worst = roundings(plan, images[:8])[0]
    assert {"outlier", "after"} <= worst.nodes
    found = within_budget(plan, within, images[:8])
    assert within(found.proto) == ""
    assert "decisions flip" in found.first
    assert "after" in found.names  # what reads the bad values must read them in float32
    assert not {"stem", "later", "head"} & set(found.names)
    assert len(found.names) <= 4
    assert node(found.proto, "after").input[1] == node(plan.proto, "after").input[1]  # its float32 weight


def test_within_budget_at_once__excludes_nothing(plan: Plan, images: np.ndarray, logits: np.ndarray) -> None:
    found = within_budget(plan, flips(logits, images, 4), images[:4])
    assert (found.names, found.tried, found.first) == ((), 1, "")


def test_budget_that_cannot_be_met__fails_and_says_what_was_tried(plan: Plan, images: np.ndarray) -> None:
    with pytest.raises(CheckFailed, match=r"even without \d+ of \d+ roundings.*\(\d+ graphs tried\).*never"):
        within_budget(plan, lambda proto: "never", images[:2])


def test_roundings__all_on_is_the_int8_graph_and_all_off_the_float32_one(
    plan: Plan, images: np.ndarray
) -> None:
    proto, names = switched(plan)
    session = open_proto(proto)
    for on, other in ((False, plan.proto), (True, quantize(plan, explicit=True))):
        feeds = {"images": images[:16], "switches": np.full(len(names), on)}
        (found,) = session.run(["logits"], feeds)
        expected = run(open_proto(other), images[:16])["logits"]
        np.testing.assert_allclose(found, expected, atol=(0.03 if on else 1e-3) * np.abs(expected).max())


def test_float32_layer__is_not_rounded_by_onnxruntime_when_it_loads(plan: Plan, images: np.ndarray) -> None:
    """Its optimiser rounds float32 weights between int8 values, one scale for all channels, where it may."""
    uneven = copy_of(plan.proto)
    weight = initializers(uneven)[node(uneven, "depthwise").input[1]]
    values = numpy_helper.to_array(weight) * np.geomspace(1, 1e-3, 16, dtype=np.float32)[:, None, None, None]
    weight.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight.name))
    made = quantize(replace(plan, proto=uneven), frozenset({"depthwise"}))
    plainly, loaded = (run(open_proto(made, level=level), images)["logits"] for level in ("disable", "all"))
    assert np.abs(plainly - loaded).max() < 0.05 * np.abs(plainly).max()


# -- closeness ------------------------------------------------------------------------------------------


def test_closeness__by_hand() -> None:
    expected = {"logits": np.array([[3.0, 1.0], [1.0, 1.0], [0.0, 2.0]], np.float32)}
    found = {"logits": np.array([[2.0, 1.0], [0.9, 1.0], [3.0, 2.0]], np.float32)}
    near = closeness(expected, found)
    assert (near.images, near.decided, near.flipped) == (3, 2, 1)  # a tie is no decision
    assert near.top1 == pytest.approx(1 / 3)
    assert near.max_relative == pytest.approx(1.0)
    assert near.cosine == pytest.approx(4 / (2 * 13**0.5))
    broken = closeness(expected, {"logits": np.full((3, 2), np.nan, np.float32)})
    assert (broken.cosine, broken.max_relative) == (None, None)


def test_closeness__of_features_decides_nothing() -> None:
    values = {"features": np.ones((2, 3), np.float32)}
    near = closeness(values, values)
    assert (near.decided, near.flipped, near.top1, near.cosine) == (None, None, None, pytest.approx(1.0))


def test_plan__is_not_changed_by_quantising(net: onnx.ModelProto) -> None:
    plan = plan_of(net, images=CALIBRATION[:8])
    before = plan.proto.SerializeToString(deterministic=True)
    ranges = {name: [np.copy(side) for side in data.range_value] for name, data in plan.ranges.items()}
    first, again = quantize(plan), quantize(plan)
    assert plan.proto.SerializeToString(deterministic=True) == before
    assert ops(first) == ops(again)
    assert set(plan.ranges.keys()) == set(ranges)
    for name, data in plan.ranges.items():
        np.testing.assert_array_equal(data.range_value, ranges[name])
    assert ops(quantize(replace(plan, gates=False))) != ops(first)
