"""Bisection names the node that a fault was planted in, whatever wrote the graph and whatever the fault."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, quantize_static

from tests.support_export import write_bundle_of
from tldist.export.bisect import bisect
from tldist.export.dataflow import module_of
from tldist.export.departure import Departure
from tldist.export.graph import ExportGraph, load_graph
from tldist.export.natural import natural_images
from tldist.export.onnx_values import Graph, run_values
from tldist.export.program import Program, export_by_torchscript, record, values_of
from tldist.runtime.session import open_session

IMAGES = natural_images(1, 40, 40)
Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def graph(small: tuple[Path, Path]) -> ExportGraph:
    return load_graph(small[0], ("logits", "probabilities"), trust_code=True)[0]


@pytest.fixture(scope="module")
def proto(small: tuple[Path, Path]) -> onnx.ModelProto:
    return onnx.load(small[1] / "model.onnx")


@pytest.fixture(scope="module")
def program(graph: ExportGraph, proto: onnx.ModelProto) -> Program:
    return record(graph, proto, IMAGES)


def changed(proto: onnx.ModelProto, change: Change) -> onnx.ModelProto:
    wrong = onnx.ModelProto()
    wrong.CopyFrom(proto)
    change(wrong)
    return wrong


def set_weight(name: str, place: tuple[Any, ...], value: float | np.ndarray) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array[place] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))

    return change


def set_op(output: str, op: str, **attributes: float) -> Change:
    def change(proto: onnx.ModelProto) -> None:
        node = next(node for node in proto.graph.node if output in node.output)
        node.op_type = op
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())

    return change


def found_at(
    graph: ExportGraph, program: Program | None, wrong: onnx.ModelProto, tolerance: float = 1e-5
) -> Departure:
    departure = bisect(graph, wrong, IMAGES, tolerance=tolerance, program=program)
    assert departure is not None
    return departure


def test_bisect__right_graph_has_no_departure(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto, small: tuple
) -> None:
    assert bisect(graph, proto, IMAGES) is None  # exports it anew
    session = open_session(small[1] / "model.onnx", threads=1)
    assert (
        bisect(graph, small[1] / "model.onnx", np.repeat(IMAGES, 3, axis=0), session=session, program=program)
        is None
    )


def test_bisect__one_weight(graph: ExportGraph, program: Program, proto: onnx.ModelProto) -> None:
    wrong = changed(proto, set_weight("model.conv.weight", (5, 1, 2, 0), 0.3))
    departure = found_at(graph, program, wrong)
    assert (departure.stage, departure.op, departure.value) == ("graph", "Conv", "getitem_3")
    assert departure.module in ("model.conv", "model.norm2")  # the exporter folded one into the other
    assert departure.agrees == "relu"
    assert departure.position[1] == 5  # the channel whose weight it is
    assert (
        "'model.conv.weight' differs from the bundle's in 1 of 576 values: at [5, 1, 2, 0]" in departure.why
    )
    assert "0.3 in the package" in departure.why
    # Both values, against the same two graphs run by hand.
    names = ["getitem_3"]
    right, bad = (run_values(Graph(model), names, IMAGES)["getitem_3"] for model in (proto, wrong))
    assert departure.expected == pytest.approx(float(right[departure.position]), rel=1e-5)
    assert departure.found == pytest.approx(float(bad[departure.position]))
    gap = np.abs(bad - right)
    assert gap.max() == pytest.approx(gap[departure.position])
    assert departure.relative == pytest.approx(gap.max() / np.abs(right).max(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "op", "value", "words"),
    [
        (set_weight("model.fc.weight", (2, 3), np.nan), "Gemm", "logits", "nan in the package"),
        (set_weight("model.stem.weight", (1, 0, 0, 0), 3e38), "Conv", "getitem", "3e+38 in the package"),
        (set_op("relu", "LeakyRelu", alpha=0.1), "LeakyRelu", "relu", "computed by Relu, not LeakyRelu"),
        (set_op("relu_1", "Sigmoid"), "Sigmoid", "relu_1", "computed by Relu, not Sigmoid"),
        (set_weight("view", (0, 0, 0, 0), 0.406), "Sub", "sub_3", "'view' differs"),
        (set_op("add_50", "Sub"), "Sub", "add_50", "computed by Add, not Sub"),
    ],
    ids=["nan", "infinite", "leaky", "sigmoid", "mean", "sum"],
)
def test_bisect__names_the_node(
    graph: ExportGraph,
    program: Program,
    proto: onnx.ModelProto,
    change: Change,
    op: str,
    value: str,
    words: str,
) -> None:
    departure = found_at(graph, program, changed(proto, change))
    assert (departure.op, departure.value) == (op, value)
    assert words in departure.why
    assert f"{op} node '{departure.node}'" in departure.to_text()


def test_bisect__attribute_that_differs_is_named(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto
) -> None:
    def shift(wrong: onnx.ModelProto) -> None:
        node = next(node for node in wrong.graph.node if "getitem_3" in node.output)
        pads = next(entry for entry in node.attribute if entry.name == "pads")
        pads.ints[:] = [2, 0, 0, 2]

    departure = found_at(graph, program, changed(proto, shift))
    assert departure.op == "Conv"
    assert "has the attributes {'pads': '[1, 1, 1, 1]'}" in departure.why


def test_bisect__attribute_left_to_its_default_is_no_difference(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto
) -> None:
    def shorten(wrong: onnx.ModelProto) -> None:
        set_weight("model.fc.weight", (1, 1), 5.0)(wrong)
        gemm = next(node for node in wrong.graph.node if "logits" in node.output)
        kept = [entry for entry in gemm.attribute if entry.name == "transB"]
        del gemm.attribute[:]
        gemm.attribute.extend(kept)

    assert "'model.fc.weight' differs" in found_at(graph, program, changed(proto, shorten)).why


def test_bisect__graph_of_neither_exporter_is_named_by_its_output(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto
) -> None:
    def rename(wrong: onnx.ModelProto) -> None:
        set_weight("model.fc.weight", (1, 1), 5.0)(wrong)
        names = {name: f"my_{name}" for node in wrong.graph.node for name in node.output}
        names |= {"logits": "logits", "probabilities": "probabilities"}
        for node in wrong.graph.node:
            node.input[:] = [names.get(name, name) for name in node.input]
            node.output[:] = [names[name] for name in node.output]

    departure = found_at(graph, program, changed(proto, rename))
    assert (departure.value, departure.agrees, departure.why) == ("logits", "", "")
    assert len(departure.between) == 12
    assert "and 7 more" in departure.to_text()


def test_bisect__what_lies_between_is_named_where_names_are_gone(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto
) -> None:
    """The first convolution under another name: the next value that is known departs."""

    def rename(wrong: onnx.ModelProto) -> None:
        set_weight("model.stem.weight", (0, 0, 0, 0), 1.0)(wrong)
        for node in wrong.graph.node:
            node.input[:] = ["other" if name == "getitem" else name for name in node.input]
            node.output[:] = ["other" if name == "getitem" else name for name in node.output]

    departure = found_at(graph, program, changed(proto, rename))
    assert departure.value == "relu"
    assert departure.agrees == "div_1"
    assert [text.split()[1] for text in departure.between] == ["(Conv)"]


def test_bisect__value_with_the_name_of_another_is_passed_over(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto
) -> None:
    """A value that differs while all that follows agrees only has another meaning."""

    def rename(wrong: onnx.ModelProto) -> None:
        set_weight("model.conv.weight", (0, 0, 0, 0), 1.0)(wrong)
        for node in wrong.graph.node:  # the folded convolution, called after the one without BatchNorm
            node.input[:] = ["conv2d" if name == "getitem" else name for name in node.input]
            node.output[:] = ["conv2d" if name == "getitem" else name for name in node.output]

    departure = found_at(graph, program, changed(proto, rename))
    assert departure.value == "getitem_3"


def test_bisect__graph_of_the_torchscript_exporter(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto
) -> None:
    traced = export_by_torchscript(graph, proto, IMAGES)
    assert not {name for node in traced.graph.node for name in node.output} & {"relu", "getitem"}
    assert bisect(graph, traced, IMAGES, program=program) is None
    departure = found_at(graph, program, changed(traced, set_weight("model.fc.weight", (1, 1), 5.0)))
    assert (departure.op, departure.module) == ("Gemm", "model.fc")
    assert "5 in the package" in departure.why
    convolution = next(
        tensor.name for tensor in traced.graph.initializer if list(tensor.dims) == [8, 8, 3, 3]
    )
    departure = found_at(graph, program, changed(traced, set_weight(convolution, (1, 1, 0, 0), 2.0)))
    assert (departure.op, departure.module) == ("Conv", "model.conv")


def test_bisect__half_precision_graph_by_its_own_tolerance(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto
) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    half = convert_float_to_float16(copy.deepcopy(proto), keep_io_types=True)
    assert bisect(graph, half, IMAGES, tolerance=2e-2, program=program) is None
    name = next(tensor.name for tensor in half.graph.initializer if "conv.weight" in tensor.name)
    wrong = changed(half, set_weight(name, (3, 2, 1, 1), 2.0))
    departure = found_at(graph, program, wrong, 2e-2)
    assert departure.op == "Conv"
    assert departure.position[1] == 3


def test_bisect__int8_graph_by_its_own_tolerance(
    graph: ExportGraph, program: Program, small: tuple[Path, Path], tmp_path: Path
) -> None:
    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(natural_images(8, 40, 40))

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self.images, None)
            return None if image is None else {"images": image[None]}

    quantize_static(small[1] / "model.onnx", tmp_path / "int8.onnx", Reader(), per_channel=True)
    whole = onnx.load(tmp_path / "int8.onnx")
    assert bisect(graph, whole, IMAGES, tolerance=0.1, program=program) is None
    weight = next(t for t in whole.graph.initializer if t.name == "model.conv.weight_quantized")
    array = numpy_helper.to_array(weight)
    wrong = changed(whole, set_weight(weight.name, (...,), -array))
    departure = found_at(graph, program, wrong, 0.1)
    assert (departure.op, departure.value, departure.why) == ("Conv", "getitem_3", "")


def test_bisect__exporter_that_records_something_else(tmp_path: Path) -> None:
    bundle = write_bundle_of(tmp_path / "bundle", "tests.support_export:acts_up")
    graph = load_graph(bundle, ("logits",), trust_code=True)[0]
    proto = torch.onnx.export(graph, (torch.zeros(2, 40, 40, 3, dtype=torch.uint8),), dynamo=True).model_proto
    proto.graph.input[0].name = "images"
    departure = found_at(graph, None, proto)
    assert (departure.stage, departure.module) == ("program", "model.0")
    assert "torch.export recorded something else" in departure.to_text()


def test_bisect__right_graph_that_is_run_wrong(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto, tmp_path: Path
) -> None:
    """The session computes something else than the graph, as a faulty kernel or fusion would."""
    onnx.save(changed(proto, set_weight("model.fc.bias", (1,), 1.0)), tmp_path / "other.onnx")
    session = open_session(tmp_path / "other.onnx", threads=1)
    assert bisect(graph, proto, IMAGES, program=program) is None
    departure = bisect(graph, proto, IMAGES, session=session, program=program)
    assert departure is not None
    assert (departure.stage, departure.value, departure.node) == ("session", "logits", "")
    assert departure.to_text().startswith(
        "the graph is right, ONNX Runtime's optimisation or provider is not"
    )
    assert "CPUExecutionProvider" in departure.why


def test_bisect__weights_beside_the_graph(
    graph: ExportGraph, program: Program, proto: onnx.ModelProto, tmp_path: Path
) -> None:
    wrong = changed(proto, set_weight("model.conv.weight", (5, 1, 2, 0), 0.3))
    onnx.save(
        wrong,
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
    )
    assert (tmp_path / "model.onnx.data").stat().st_size > 1000
    departure = bisect(graph, tmp_path / "model.onnx", IMAGES, program=program)
    assert departure is not None
    assert (departure.op, departure.value) == ("Conv", "getitem_3")
    assert "0.3 in the package" in departure.why


def test_run_values__are_those_of_the_graph_cut_there(proto: onnx.ModelProto) -> None:
    cut = onnx.utils.Extractor(proto).extract_model(["images"], ["relu_1"])
    session = onnxruntime.InferenceSession(cut.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"images": IMAGES})
    found = run_values(Graph(proto), ["relu_1", "logits"], IMAGES)
    assert set(found) == {"relu_1", "logits", "probabilities"}
    np.testing.assert_allclose(found["relu_1"], expected, rtol=1e-5, atol=1e-6)
    assert proto.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT
    assert [value.name for value in proto.graph.output] == ["logits", "probabilities"]  # left as it was


def test_values_of__are_pytorchs_in_float64(graph: ExportGraph, program: Program) -> None:
    found = values_of(program, graph.outputs, IMAGES, ["relu", "add_50"])
    assert set(found) == {"relu", "add_50", "logits", "probabilities"}
    exact = copy.deepcopy(graph).double()
    kept: list[torch.Tensor] = []
    exact.model.act.register_forward_hook(lambda _module, _inputs, value: kept.append(value))
    with torch.no_grad():
        logits, _ = exact(torch.from_numpy(IMAGES))
    # Mean and deviation were recorded as float32; all arithmetic on them is float64.
    np.testing.assert_allclose(found["relu"].exact, kept[0].numpy(), rtol=0, atol=3e-7)
    np.testing.assert_allclose(found["logits"].exact, logits.numpy(), rtol=0, atol=3e-7)
    assert (found["relu"].exact != found["relu"].exact.astype(np.float32)).any()
    assert 1e-9 < found["logits"].own_error < 1e-5


@pytest.mark.parametrize(
    ("name", "scopes", "module"),
    [
        ("/model/layer1/layer1.0/conv1/Conv", "", "model.layer1.0.conv1"),
        ("/model/features/features.3/features.3.0/Conv", "", "model.features.3.0"),
        ("node_Conv_3", "['', 'model', 'model.stem', 'conv2d']", "model.stem"),
        ("node_Conv_3", "", ""),
        ("node_Conv_3", "__import__('os')", ""),
        ("node_Conv_3", "[", ""),
        ("node_Conv_3", "3", ""),
    ],
)
def test_module_of__reads_both_exporters_notes(name: str, scopes: str, module: str) -> None:
    node = helper.make_node("Conv", ["x"], ["y"], name)
    if scopes:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    assert module_of(node) == module
