"""The steps from float32 to a profile's precision: what they say is recomputed; what cannot be is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from tests.support_precision import Net, body, judge_against, ops, pictures, run_float
from tldist.errors import MachineError, ModelError, RecipeError
from tldist.export.precision import graphs, steps
from tldist.export.precision.graphs import copy_of, with_names
from tldist.export.precision.lower import Lowered, lower
from tldist.export.precision.running import measure, open_proto, run
from tldist.export.precision.steps import ratio
from tldist.export.profile import Profile, find_profile

CALIBRATION = pictures(32, seed=5)[0]
INT8, FP32 = find_profile("cpu-int8"), find_profile("cpu-fp32")


@pytest.fixture(scope="session")
def lowered(net: onnx.ModelProto, images: np.ndarray, logits: np.ndarray) -> Lowered:
    """The fitted network in int8, every step made."""
    judge = judge_against(logits[:40], images[:40], 0.35)
    return lower(net, INT8, judge=judge, judged=images, calibration=CALIBRATION)


def test_int8__its_steps_are_told_in_order(lowered: Lowered) -> None:
    names = [step.name for step in lowered.steps]
    assert names == [
        "exporter", "int8", "integer input", "integer pooling", "integer gates", "onnxruntime levels",
    ]  # fmt: skip
    assert not any(step.dropped for step in lowered.steps)
    for before, after in zip(lowered.steps, lowered.steps[1:]):
        assert before.nodes[1] == after.nodes[0]
        assert before.bytes[1] == after.bytes[0]


def test_figures__are_those_of_the_graphs(
    lowered: Lowered, net: onnx.ModelProto, images: np.ndarray, logits: np.ndarray
) -> None:
    first, last = lowered.steps[0], lowered.steps[-2]
    assert (first.nodes[0], last.nodes[1]) == (len(net.graph.node), len(lowered.proto.graph.node))
    for size, proto in ((first.bytes[0], net), (last.bytes[1], lowered.proto)):
        names = sum(len(tensor.SerializeToString()) for tensor in proto.graph.initializer)
        assert abs(size - len(proto.SerializeToString())) < 0.3 * len(proto.SerializeToString())
        assert names > 0
    found = run(open_proto(lowered.proto), images)["logits"].astype(np.float64)
    exact = logits.astype(np.float64)
    near = last.closeness
    assert near is not None
    assert near.images == len(images)
    assert near.top1 == pytest.approx((found.argmax(1) == exact.argmax(1)).mean())
    assert near.flipped == int((found.argmax(1) != exact.argmax(1)).sum())
    assert near.max_relative == pytest.approx(np.abs(found - exact).max() / np.abs(exact).max(), rel=1e-6)
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(exact, axis=1)
    assert near.cosine == pytest.approx(((found * exact).sum(1) / lengths).min())
    assert near.top1 >= 0.98


def test_latencies__are_measured_at_both_batch_sizes(lowered: Lowered) -> None:
    for step in lowered.steps[:-1]:
        assert step.latency is not None
        assert set(step.latency) == {"1", "32"}
        assert 0 < step.latency["1"] < step.latency["32"]
        assert step.unmeasured == ""
    assert set(lowered.steps[-1].levels) == {"disable", "basic", "extended", "all"}
    assert lowered.steps[-1].latency is None


def test_steps__are_plain_json(lowered: Lowered) -> None:
    plain = json.loads(json.dumps(lowered.to_dicts(), allow_nan=False))
    assert plain[1]["name"] == "int8"
    assert plain[1]["closeness"]["images"] == 200
    assert "128" not in plain[1]["what"]  # the pictures that there were, not those of the profile
    assert "32 pictures" in plain[1]["what"]


def test_shipped_graph__holds_standard_operators_only(lowered: Lowered) -> None:
    """ONNX Runtime's own optimisation, for the layout of one CPU, is not stored."""
    assert {node.domain for node in lowered.proto.graph.node} == {""}
    assert [entry.domain for entry in lowered.proto.opset_import] == [""]
    onnx.checker.check_model(lowered.proto, full_check=True)


@pytest.mark.parametrize(("gain", "kept"), [(0.0, False), (1e9, True)])
def test_measured__drops_what_is_not_faster_and_says_so(
    gain: float, kept: bool, net: onnx.ModelProto, images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With the gain that is asked for out of reach, and at everything's reach."""
    monkeypatch.setattr("tldist.export.precision.lower.GAIN", gain)
    made = lower(
        net, INT8, judge=lambda proto: [], judged=images, calibration=CALIBRATION, optimize="measured"
    )
    optional = [step for step in made.steps if step.name.startswith("integer")]
    assert len(optional) == 3
    assert all((step.dropped == "") == kept for step in optional)
    said = capsys.readouterr().out
    assert ("integer gates: takes" in said) == (not kept)
    assert ("GlobalAveragePool" in ops(made.proto)) == kept
    assert ("HardSigmoid" in ops(made.proto)) == (not kept)
    assert made.steps[1].dropped == ""  # the precision itself is always kept
    if not kept:
        assert made.steps[-1].nodes[1] == made.steps[1].nodes[1] == len(made.proto.graph.node)


def test_none__makes_no_optional_step(net: onnx.ModelProto, images: np.ndarray) -> None:
    made = lower(net, INT8, judge=lambda proto: [], judged=images, calibration=CALIBRATION, optimize="none")
    assert [step.name for step in made.steps] == ["exporter", "int8", "onnxruntime levels"]


def test_parity_faults__send_layers_back_to_float32_too(net: onnx.ModelProto, images: np.ndarray) -> None:
    """The decisions are well, and parity is not: it wants the gate's convolution in float32."""
    weight = next(node for node in net.graph.node if node.name == "project").input[1]

    def judge(proto: onnx.ModelProto) -> list[str]:
        there = {name for node in proto.graph.node if node.op_type == "Conv" for name in node.input}
        return [] if weight in there else ["not mine"]

    made = lower(net, INT8, judge=judge, judged=images, calibration=CALIBRATION, optimize="none")
    (step,) = [step for step in made.steps if step.name == "float32 layers"]
    assert "project" in step.what
    assert "because not mine" in step.what
    assert step.faults == ()
    assert made.steps[1].faults == ("not mine",)


def test_fp32__is_the_exporter_graph_untouched(net: onnx.ModelProto, images: np.ndarray) -> None:
    before = net.SerializeToString(deterministic=True)
    made = lower(net, FP32, judge=lambda proto: [], judged=images[:8])
    assert made.proto is net
    assert net.SerializeToString(deterministic=True) == before
    assert [step.name for step in made.steps] == ["exporter", "onnxruntime levels"]
    assert made.steps[0].closeness is not None
    assert made.steps[0].closeness.max_relative == 0


def test_fp16__agrees_and_says_what_stayed(
    net: onnx.ModelProto, images: np.ndarray, logits: np.ndarray, fp16_on_cpu: Profile
) -> None:
    judge = judge_against(logits[:16], images[:16], 0.01)
    made = lower(net, fp16_on_cpu, judge=judge, judged=images[:16])
    assert [step.name for step in made.steps] == ["exporter", "fp16", "onnxruntime levels"]
    assert "4 nodes" in made.steps[1].what
    error = np.abs(run_float(made.proto, images[:16]) - logits[:16]).max()
    assert 0 < error < 0.01 * np.abs(logits).max()
    assert made.steps[1].bytes[1] < made.steps[1].bytes[0]


# -- what cannot be -------------------------------------------------------------------------------------


def test_bf16__needs_a_provider_that_has_it(net: onnx.ModelProto, images: np.ndarray) -> None:
    profile = find_profile("cuda-bf16").model_copy(update={"provider": "CPUExecutionProvider"})
    with pytest.raises(MachineError, match="no bf16 kernels"):
        lower(net, profile, judge=lambda proto: [], judged=images)


def test_int8__needs_calibration_images(net: onnx.ModelProto, images: np.ndarray) -> None:
    for nothing in (None, images[:0]):
        with pytest.raises(RecipeError, match="give calibration=D"):
            lower(net, INT8, judge=lambda proto: [], judged=images, calibration=nothing)


def test_graph_beyond_2_gb__is_left_as_it_is_or_refused(
    net: onnx.ModelProto, images: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = copy_of(net)
    outside.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL
    small = graphs.size_of(net)
    for proto, largest in ((outside, graphs.LARGEST), (net, small)):
        monkeypatch.setattr(graphs, "LARGEST", largest)
        with pytest.raises(ModelError, match=r"larger than 2 GB.*use a profile of fp32"):
            lower(proto, INT8, judge=lambda proto: [], judged=images, calibration=CALIBRATION)
        made = lower(proto, FP32, judge=lambda proto: [], judged=images)
        assert made.proto is proto
        assert made.steps[0].latency is None
        assert "larger than 2 GB" in made.steps[0].unmeasured


def test_feature_extractor__is_held_to_cosine(images: np.ndarray) -> None:
    net = Net()
    proto = net.proto(body(net), width=16)
    proto.graph.output[0].name = proto.graph.node[-1].output[0] = "features"
    found = []
    for least in (0.01, None):
        least = least or (1 + found[0]) / 2  # half the error that it has without exclusions
        held = INT8.tolerances.model_copy(update={"min_cosine": least})
        profile = INT8.model_copy(update={"tolerances": held})
        made = lower(proto, profile, judge=lambda proto: [], judged=images[:32], calibration=CALIBRATION)
        near = made.steps[-2].closeness
        assert near is not None
        assert (near.flipped, near.top1) == (None, None)
        assert near.cosine is not None
        assert near.cosine >= least
        found.append(near.cosine)
    assert made.steps[-2].name == "float32 layers"


# -- measuring ------------------------------------------------------------------------------------------


def test_measure__tells_a_slower_graph_from_a_faster_one() -> None:
    """Sixteen times the pixels."""
    found = {}
    for side in (16, 64):
        net = Net()
        proto = with_names(
            net.proto(net.pooled(net.conv(net.conv(net.normalised(), 3, 16, 3), 16, 4, 3)), side=side)
        )
        images = pictures(1, side=side)[0]
        found[side] = measure({"one": open_proto(proto)}, images, (1, 4))["one"]
    assert found[64]["4"] > 2 * found[16]["4"]
    assert ratio(found[16], found[64]) > 2


def test_ratio__by_hand() -> None:
    assert ratio({"1": 2.0, "32": 8.0}, {"1": 1.0, "32": 16.0}) == pytest.approx(1.0)
    assert ratio({"1": 2.0, "32": 8.0}, {"1": 1.0}) == pytest.approx(0.5)
    assert ratio({}, {}) == 1.0
    assert 0.9 < steps.GAIN < 1
