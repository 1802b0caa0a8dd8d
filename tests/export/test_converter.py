"""Conversion: what each exporter makes is checked, and the first right graph is taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer

from tests.support import REPOSITORY
from tests.support_export import (
    acts_up,
    acts_up_always,
    decides,
    free_cnn,
    pooled_cnn,
    small_vit,
    write_bundle_of,
)
from tests.support_models import lively_model
from tldist import api
from tldist.bundle import BundleConfig
from tldist.errors import CheckFailed, ModelError
from tldist.export.conversion_check import graph_fault, structure_fault
from tldist.export.converter import Converted, convert
from tldist.export.graph import ExportGraph, run_graph
from tldist.export.natural import natural_images
from tldist.fuse.outputs import build_ensemble
from tldist.models.chain import Affine
from tldist.models.composite_layout import Input
from tldist.models.description import build_model
from tldist.models.zoo import describe_network
from tldist.runtime.package import Package
from tldist.runtime.preprocess import Preprocessing

HOW = Preprocessing(height=40, width=40, resize=40)


def graph_of(model: nn.Module, outputs: Sequence[str] = ("logits",), **options: Any) -> ExportGraph:
    return ExportGraph(model.eval(), HOW, outputs, **options).eval()


def made(builder: Any, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = builder(classes)
    return model


def run(proto: onnx.ModelProto, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, {"images": images})))


def shapes(proto: onnx.ModelProto) -> dict[str, list[str | int]]:
    return {
        value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }


def assert_agrees(converted: Converted, graph: ExportGraph, size: tuple[int, int], count: int = 3) -> None:
    """Against PyTorch in float64."""
    images = natural_images(count, *size, seed=5)
    found = run(converted.proto, images)
    wide = run_graph(graph.double(), images)
    graph.float()
    assert list(found) == list(graph.outputs)
    for name, expected in wide.items():
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


# -- which exporter ------------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_convert__each_exporter_gives_speaking_names_and_no_paths(exporter: Any) -> None:
    graph = graph_of(made(free_cnn))
    converted = convert(graph, 18, exporter)
    assert converted.opset == converted.to_dict()["opset"] == 18
    assert [entry.version for entry in converted.proto.opset_import if not entry.domain] == [18]
    assert (converted.exporter, converted.refused) == (exporter, ())
    assert_agrees(converted, graph, (40, 40))
    names = [node.name for node in converted.proto.graph.node]
    assert len(set(names)) == len(names)
    assert {"5/Tanh", "8/Gemm"} <= set(names)
    assert shapes(converted.proto) == {"images": ["batch", 40, 40, 3], "logits": ["batch", 4]}
    assert str(REPOSITORY).encode() not in converted.proto.SerializeToString()
    assert torch.__version__.startswith(converted.to_dict()["versions"]["torch"])


def test_convert__nodes_are_named_after_modules_of_an_ensemble_too() -> None:
    ensemble = ensemble_of("mobilenet_v3_small", "tests.nets:plain_cnn")
    paths = {path for path, _ in ensemble.named_modules()}
    proto = convert(graph_of(ensemble), None, "torchscript").proto
    inside = [node.name.rpartition("/")[0] for node in proto.graph.node if "/" in node.name]
    assert len(inside) > 120
    assert set(inside) <= paths
    assert "members.0.model.features.4.block.1.0/Conv" in {node.name for node in proto.graph.node}


def test_convert__wrong_graph_is_refused_and_the_other_exporter_takes_over() -> None:
    converted = convert(graph_of(made(acts_up)), None)
    assert converted.exporter == "torchscript"
    assert [name for name, _ in converted.refused] == ["dynamo"]
    assert "differs from PyTorch's by" in converted.refused[0][1]
    assert converted.to_dict()["refused"][0]["exporter"] == "dynamo"


def test_convert__all_wrong_names_every_reason(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckFailed, match=r"dynamo: 'logits'.*differs.*; torchscript: 'logits'.*differs"):
        convert(graph_of(made(acts_up_always)), None)
    with pytest.raises(ModelError, match=r"dynamo: .*; torchscript: 'logits'.*differs") as error:
        convert(graph_of(made(decides)), None)
    assert len(str(error.value).splitlines()) == 1
    assert capfd.readouterr() == ("", "")


def test_convert__check_of_the_caller_decides_too() -> None:
    seen = []

    def check(proto: onnx.ModelProto) -> str:
        seen.append(len(proto.graph.node))
        return "too plain" if len(seen) == 1 else ""

    converted = convert(graph_of(made(free_cnn)), None, check=check)
    assert converted.exporter == "torchscript"
    assert converted.refused == (("dynamo", "too plain"),)
    assert len(seen) == 2


def test_convert__a_failure_that_prints_stays_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    # 17 cells do not divide into 6: TorchScript's C++ prints the graph
    with pytest.raises(ModelError, match="adaptive_avg_pool2d"):
        convert(graph_of(made(pooled_cnn)), None, "torchscript")
    assert capfd.readouterr() == ("", "")


def test_check__finds_each_fault() -> None:
    graph = graph_of(made(free_cnn), ("logits", "features"))
    right = convert(graph, None, "torchscript").proto

    def changed(change: Any) -> onnx.ModelProto:
        proto = onnx.ModelProto()
        proto.CopyFrom(right)
        change(proto)
        return proto

    def fix_batch(proto: onnx.ModelProto) -> None:
        proto.graph.output[1].type.tensor_type.shape.dim[0].dim_value = 2

    def swap(proto: onnx.ModelProto) -> None:
        proto.graph.output.append(proto.graph.output[0])
        del proto.graph.output[0]

    def scale(proto: onnx.ModelProto) -> None:
        weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
        values = onnx.numpy_helper.to_array(weight) * np.float32(1.1)
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    def poison(proto: onnx.ModelProto) -> None:
        weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 2)
        values = onnx.numpy_helper.to_array(weight) * np.float32("nan")
        weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))

    def unknown(proto: onnx.ModelProto) -> None:
        proto.graph.node[-1].op_type = "NoSuchOperator"

    assert structure_fault(graph, right, None) == ""
    assert "opset 18" in structure_fault(graph, right, 18)
    assert "fixed at 'features'" in structure_fault(graph, changed(fix_batch), None)
    assert "its outputs are" in structure_fault(graph, changed(swap), None)
    assert graph_fault(graph, right) == ("", False)
    fault, values = graph_fault(graph, changed(scale))
    assert (values, "differs" in fault) == (True, True)
    fault, values = graph_fault(graph, changed(poison))
    assert (values, "NaN" in fault) == (True, True)
    fault, values = graph_fault(graph, changed(unknown))
    assert (values, "structure" in fault) == (False, True)


class Chaotic(nn.Module):
    """Multiplies rounding errors until float32 and float64 are a few hundredths apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = made(free_cnn)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        waves: torch.Tensor = (self.net(images) * 2e5).sin()
        return waves


def test_check__a_model_that_disagrees_with_itself_is_no_fault_of_the_graph() -> None:
    graph = graph_of(Chaotic())
    images = natural_images(2, 40, 40)
    narrow = run_graph(graph, images)["logits"]
    proto = convert(graph, None, "torchscript").proto
    assert np.abs(run(proto, images)["logits"] - narrow).max() > 2e-3  # more than any right graph may differ
    assert graph_fault(graph, proto) == ("", False)
    weight = next(tensor for tensor in proto.graph.initializer if len(tensor.dims) == 4)
    values = onnx.numpy_helper.to_array(weight) * np.float32(1.1)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    assert "differs from PyTorch's" in graph_fault(graph, proto)[0]


# -- what goes in and comes out ------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "gem", "max", "flatten"])
def test_convert__inner_layers_pooled_and_scaled(pool: str) -> None:
    model = made(free_cnn)
    outputs = ("logits", "probabilities", "features", "features.1", "features.3", "features.7")
    graph = graph_of(model, outputs, temperature=1.7, pool=pool, l2=True)
    converted = convert(graph, None, "torchscript")
    images = natural_images(2, 40, 40, seed=3)
    found = run(converted.proto, images)
    assert list(found) == list(outputs)
    mean, std = np.array(HOW.mean), np.array(HOW.std)
    x = torch.from_numpy(((images / 255 - mean) / std).transpose(0, 3, 1, 2))
    wide = model.double()
    with torch.no_grad():
        after = {layer: wide[: layer + 1](x).numpy() for layer in (1, 3, 7)}
    model.float()
    for layer, values in after.items():
        rows = {
            "mean": lambda v: v.mean(2),
            "max": lambda v: v.max(2),
            "gem": lambda v: (np.maximum(v, 1e-6) ** 3).mean(2) ** (1 / 3),
            "flatten": lambda v: v.reshape(2, -1),
        }
        vector = rows[pool](values.reshape(2, values.shape[1], -1)) if values.ndim == 4 else values
        expected = vector / np.linalg.norm(vector, axis=1, keepdims=True)
        np.testing.assert_allclose(found[f"features.{layer}"], expected, atol=1e-5)
    np.testing.assert_allclose(found["features"], found["features.7"], atol=1e-6)
    logits = torch.from_numpy(found["logits"])
    np.testing.assert_allclose(found["probabilities"], (logits / 1.7).softmax(1).numpy(), atol=1e-6)


def test_convert__vision_transformer_with_class_token() -> None:
    graph = graph_of(made(small_vit), ("logits", "features", "features.encoder"), pool="token")
    converted = convert(graph, None)
    assert_agrees(converted, graph, (40, 40), count=7)
    inside = {node.name.rpartition("/")[0] for node in converted.proto.graph.node} - {""}
    assert "encoder.layers.encoder_layer_1.mlp.0" in inside
    assert inside <= {path for path, _ in graph.model.named_modules()}
    found = run(converted.proto, natural_images(2, 40, 40))
    np.testing.assert_allclose(found["features"], found["features.encoder"], atol=1e-6)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_convert__dynamic_takes_images_of_any_size(exporter: Any) -> None:
    model = made(free_cnn)
    graph = graph_of(model, ("logits", "features.4"), input="dynamic", l2=True)
    converted = convert(graph, None, exporter)
    expected = {
        "images": ["batch", "height", "width", 3],
        "logits": ["batch", 4],
        "features.4": ["batch", 12],
    }
    assert shapes(converted.proto) == expected
    for size in ((40, 40), (33, 97), (128, 41), (17, 18)):
        assert_agrees(converted, graph, size)


def test_convert__dynamic_that_cannot_be_says_why() -> None:
    with pytest.raises(ModelError, match=r"VisionTransformer does not take .*72x40.*Wrong image height"):
        convert(graph_of(made(small_vit), input="dynamic"), None)
    flat = graph_of(made(free_cnn), ("logits", "features.4"), input="dynamic", pool="flatten")
    with pytest.raises(ModelError, match=r"width of 'features.4' depends on the size .* pool="):
        convert(flat, None)


def test_convert__dynamic_that_is_right_at_one_size_only_is_refused() -> None:
    """Swin decides by the size of the image whether it shifts its windows; a graph has one of the two."""
    torch.manual_seed(0)
    swin = SwinTransformer([4, 4], 8, [2, 2], [2, 2], [7, 7], num_classes=4)
    with torch.no_grad():
        for parameter in swin.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # attention that is not the same everywhere
    for model, exporter in ((swin, "torchscript"), (made(pooled_cnn), "dynamo")):
        with pytest.raises(ModelError, match=r"differs from PyTorch's .* right at 40x40"):
            convert(graph_of(model, input="dynamic"), None, exporter)  # type: ignore[arg-type]


def test_convert__dynamic_ensemble_whose_members_see_other_sizes() -> None:
    with pytest.raises(ModelError, match="a member of Ensemble is given images of another size"):
        convert(graph_of(ensemble_of("tests.nets:plain_cnn", size=32), input="dynamic"), None)


# -- composites ----------------------------------------------------------------------------------------

CLASSES = ("a", "b", "c", "d")


def parent(name: str, size: int, seed: int, task: Any = "multiclass") -> tuple[nn.Module, BundleConfig]:
    how = Preprocessing(height=size, width=size, resize=size, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    config = BundleConfig(describe_network(name, 4), CLASSES, how, temperature=1.5, task=task)
    return lively_model(name, 4, seed), config


def ensemble_of(
    *names: str, combine: Any = "probabilities", size: int = 40, task: Any = "multiclass"
) -> nn.Module:
    """An ensemble that takes 40x40 pixels, and a last member that takes ``size``."""
    first = parent("tests.support_export:free_cnn", 40, 9, task)
    parents = [parent(name, size, seed, task) for seed, name in enumerate(names)]
    return build_ensemble([*parents, first], combine)[0]


@pytest.mark.parametrize(
    ("combine", "task"),
    [("logits", "multiclass"), ("probabilities", "multiclass"), ("probabilities", "multilabel")],
)
def test_convert__ensembles_with_features_of_members(combine: Any, task: Any) -> None:
    ensemble = ensemble_of("tests.nets:plain_cnn", combine=combine, size=32, task=task)
    outputs = ("logits", "probabilities", "features", "features.members.0.model.2")
    graph = graph_of(ensemble, outputs, temperature=1.3, task=task, l2=True)
    exporter = "dynamo" if task == "multilabel" else "torchscript"
    converted = convert(graph, None, exporter)  # type: ignore[arg-type]
    assert_agrees(converted, graph, (40, 40), count=5)
    assert shapes(converted.proto)["features"] == ["batch", 64 + 12]


def test_convert__concatenation_and_chain_upon_it() -> None:
    """Members of two sizes side by side, a map, a head; and the same as the backbone of a longer chain."""
    parents = [parent("tests.nets:plain_cnn", 32, 1)[1], parent("tests.support_export:free_cnn", 40, 2)[1]]
    members = [
        {"model": config.model, "input": Input.of(config.preprocessing).model_dump(), "features": width}
        for config, width in zip(parents, (64, 12))
    ]
    concat = {
        "type": "concat",
        "input": members[1]["input"],
        "members": members,
        "transforms": [{"type": "affine", "in": 76, "out": 9}],
        "head": {"type": "linear", "in": 9, "out": 4},
    }
    maps = [{"type": "affine", "in": 9, "out": 5}]
    chain = {"type": "chain", "backbone": concat, "transforms": maps, "head": {"in": 5, "out": 4}}
    for description, prefix, width in ((concat, "", 9), (chain, "backbone.", 5)):
        torch.manual_seed(3)
        model = build_model(description, trust_code=True)
        for module in model.modules():
            if isinstance(module, Affine):
                nn.init.normal_(module.weight)
        inner = [f"features.{prefix}{layer}" for layer in ("members.1", "transforms.0")]
        graph = graph_of(model, ("logits", "features", *inner), pool="max")
        converted = convert(graph, None, "torchscript")
        assert_agrees(converted, graph, (40, 40), count=5)
        assert [dims[1] for dims in shapes(converted.proto).values()] == [40, 4, width, 12, 9]


@pytest.mark.parametrize(
    ("name", "layer"), [("convnext_atto", "stages.1"), ("vit_tiny_patch16_224", "blocks.1")]
)
def test_convert__timm(name: str, layer: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 48, "depth": 2} if name.startswith("vit") else {"depths": (1, 1, 1, 1)}
    model = timm.create_model(name, num_classes=4, **options).eval()
    how = Preprocessing(height=48, width=48, resize=48)
    graph = ExportGraph(model, how, ("logits", "features", f"features.{layer}"), l2=True).eval()
    assert_agrees(convert(graph, None, "torchscript"), graph, (48, 48))


# -- served --------------------------------------------------------------------------------------------


def test_convert__package_with_inner_layers_serves(tmp_path: Path) -> None:
    bundle = write_bundle_of(tmp_path / "bundle", "tests.support_export:free_cnn")
    api.export(
        bundle=str(bundle),
        out=tmp_path / "out",
        output="features",
        layers=("1", "4"),
        pool="max",
        l2=True,
        exporter="torchscript",
        trust_code=True,
        samples=2,
    )
    package = Package.open(tmp_path / "out", threads=1)
    assert package.config.outputs == {"features": 12, "features.1": 8, "features.4": 12}
    lengths = np.linalg.norm(package.run(natural_images(3, 40, 40))["features.1"], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
