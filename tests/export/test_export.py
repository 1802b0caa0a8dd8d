"""Export: what is in the package computes what the bundle computes, or there is no package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torchvision.models import squeezenet1_1

from tests.support import REPOSITORY, make_images
from tests.support_export import CLASSES, SMALL, write_bundle_of
from tldist import api
from tldist.bundle import BundleConfig, read_bundle
from tldist.cli import main
from tldist.errors import CheckFailed, MachineError, ModelError, PackageError, RecipeError
from tldist.export.graph import ExportGraph
from tldist.models.load import input_tensor, save_bundle, start_model
from tldist.models.zoo import build_network, describe_network
from tldist.runtime.package import Package
from tldist.runtime.predict import probabilities
from tldist.share import find_shared

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def noise(count: int, size: int = 40, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def plain_squeezenet(bundle: Path, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits and pooled features in float64, by torchvision alone."""
    model = squeezenet1_1(num_classes=len(CLASSES)).double().eval()
    model.load_state_dict(load_file(bundle / "model.safetensors"))
    scaled = (images / 255.0 - MEAN) / STD
    with torch.no_grad():
        features = model.features(torch.from_numpy(scaled.transpose(0, 3, 1, 2)))
        return model.classifier(features).mean((2, 3)).numpy(), features.mean((2, 3)).numpy()


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_export__any_batch_agrees_with_torchvision(exported: tuple[Path, Path], count: int) -> None:
    bundle, package = exported
    session = onnxruntime.InferenceSession(package / "model.onnx", providers=["CPUExecutionProvider"])
    logits, features = session.run(None, {"images": noise(count)})
    expected = plain_squeezenet(bundle, noise(count))
    np.testing.assert_allclose(logits, expected[0], rtol=0, atol=1e-5 * np.abs(expected[0]).max())
    np.testing.assert_allclose(features, expected[1], rtol=0, atol=1e-5 * np.abs(expected[1]).max())


def test_export__graph_says_what_it_is(exported: tuple[Path, Path]) -> None:
    bundle, package = exported
    proto = onnx.load(package / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    about = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(about["classes"]) == list(CLASSES)
    assert json.loads(about["preprocessing"]) == SMALL.to_dict()
    assert about["bundle"] == read_bundle(bundle)[1].identity
    assert [value.name for value in proto.graph.input] == ["images"]
    assert [value.name for value in proto.graph.output] == ["logits", "features"]
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_export__no_path_of_this_machine_in_the_graph(exported: tuple[Path, Path]) -> None:
    assert str(REPOSITORY).encode() not in (exported[1] / "model.onnx").read_bytes()


def test_export__package_is_complete(exported: tuple[Path, Path]) -> None:
    bundle, package = exported
    record = json.loads((package / "package.json").read_text())
    assert {path.name for path in package.iterdir()} == {"package.json", *record["files"]}
    assert record["classes"] == list(CLASSES)
    assert record["outputs"] == {"logits": 4, "features": 512}
    certificate = json.loads((package / "parity.json").read_text())
    assert certificate["parity"] == "PASS"
    assert certificate["files"]["model.onnx"] == record["files"]["model.onnx"]
    assert certificate["bundle"]["identity"] == read_bundle(bundle)[1].identity
    assert certificate["batches"] == [1, 2, 7, 32]
    assert {"black", "white", "noise"} < certificate["samples"].keys()
    assert all(0 < len(output["pairs"]) <= 500 for output in certificate["outputs"])


def test_export__again_says_finished_and_another_is_refused(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, package = exported
    before = (package / "package.json").stat().st_mtime_ns
    assert main(["export", str(bundle), f"out={package}", "output=both", "samples=3"]) == 0
    assert "finished before" in capsys.readouterr().out
    assert (package / "package.json").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"output=both.*output=logits"):
        api.export(bundle=str(bundle), out=package, samples=3)
    with pytest.raises(RecipeError, match="generated pictures"):
        api.export(bundle=str(bundle), out=package, output="both", samples=3, data="photos")
    other = write_bundle_of(tmp_path / "other", "squeezenet1_1", seed=1)
    with pytest.raises(RecipeError, match="another bundle"):
        api.export(bundle=str(other), out=package, output="both", samples=3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(RecipeError, match="not a package"):
        api.export(bundle=str(bundle), out=tmp_path / "full")
    assert (tmp_path / "full" / "file").read_text() == "mine"


def test_export__graph_that_disagrees_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle_of(tmp_path / "bundle", "tests.support_export:acts_up_always")
    code = main(["export", str(bundle), f"out={tmp_path / 'out'}", "trust_code=true"])
    assert code == 1
    assert "differs from PyTorch's by" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_export__nan_fails(tmp_path: Path) -> None:
    bundle = write_bundle_of(tmp_path / "bundle", "tests.nets:nan_cnn")
    with pytest.raises(CheckFailed, match="NaN"):
        api.export(bundle=str(bundle), out=tmp_path / "out", trust_code=True)
    assert not (tmp_path / "out").exists()


def test_export__module_that_cannot_be_exported(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = write_bundle_of(tmp_path / "bundle", "tests.support_export:decides")
    assert main(["export", str(bundle), f"out={tmp_path / 'out'}", "trust_code=true"]) == 2
    printed = capfd.readouterr().err
    assert printed.startswith("error: Sequential cannot be exported to ONNX")
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_export__model_without_float64_has_no_referee(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bundle = write_bundle_of(tmp_path / "bundle", "tests.support_export:float_only")
    outcome = api.export(bundle=str(bundle), out=tmp_path / "out", trust_code=True)
    assert "no referee" in capfd.readouterr().err
    assert outcome.values["outputs"][0]["own_error"] is None
    assert api.parity(models=(str(tmp_path / "out"),)).passed


def test_export__transformer_with_real_samples_and_opset(tmp_path: Path) -> None:
    bundle = write_bundle_of(tmp_path / "bundle", "tests.support_export:small_vit")
    photos = make_images(tmp_path / "photos", {"x": 3, "y": 3})
    profile = (find_shared("export/profiles") / "cpu-fp32.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(profile.replace("opset: none", "opset: 19"))
    outcome = api.export(
        bundle=str(bundle),
        out=tmp_path / "out",
        profile=str(tmp_path / "mine.yaml"),
        output="features",
        data=str(photos),
        samples=5,
        trust_code=True,
    )
    assert outcome.values["samples"]["real"] == 5
    package = Package.open(tmp_path / "out", threads=1)
    assert package.config.classes == ()
    assert package.config.profile_name == "mine"
    assert package.run(noise(3))["features"].shape == (3, 32)
    assert onnx.load(tmp_path / "out" / "model.onnx").opset_import[0].version == 19


def test_export__chain_with_probabilities(tmp_path: Path) -> None:
    """backbone -> affine -> head, against the same computed from its parts."""
    torch.manual_seed(0)
    backbone = describe_network("squeezenet1_1", 4)
    description = {
        "type": "chain",
        "backbone": backbone,
        "transforms": [{"type": "affine", "in": 512, "out": 6}],
        "head": {"in": 6, "out": 4},
    }
    from tldist.models.description import build_model

    model = build_model(description).eval()
    model.transforms[0].weight.normal_()
    save_bundle(tmp_path / "bundle", model, BundleConfig(description, CLASSES, SMALL, temperature=2.5))
    api.export(bundle=str(tmp_path / "bundle"), out=tmp_path / "out", output="probabilities", samples=2)
    package = Package.open(tmp_path / "out", threads=1)
    assert list(package.config.outputs) == ["logits", "probabilities"]
    found = package.run(noise(5))
    with torch.no_grad():
        features = torch.nn.functional.relu(
            model.backbone.features(input_tensor(torch.from_numpy(noise(5)), SMALL))
        )
        mapped = features.mean((2, 3)) @ model.transforms[0].weight.T + model.transforms[0].bias
        logits = (mapped @ model.head.weight.T + model.head.bias).numpy()
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5 * np.abs(logits).max())
    calibrated = torch.softmax(torch.tensor(logits) / 2.5, 1).numpy()
    np.testing.assert_allclose(found["probabilities"], calibrated, atol=1e-5)
    np.testing.assert_allclose(
        probabilities({"logits": logits}, package.config.temperature), calibrated, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 512), ("mobilenet_v2", 1280), ("mobilenet_v3_small", 1024), ("vgg11", 4096)],
)
def test_export_graph__features_are_what_the_head_reads(name: str, width: int) -> None:
    torch.manual_seed(0)
    model = build_network(describe_network(name, 5), trust_code=True).eval()
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    with torch.no_grad():
        images = torch.from_numpy(noise(2))
        logits, features = ExportGraph(model, SMALL, ("logits", "features"))(images)
        assert features.shape == (2, width)
        torch.testing.assert_close(head(features), logits)


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "TensorrtExecutionProvider", "NoSuchProvider"])
def test_export__provider_that_is_not_there(
    exported: tuple[Path, Path], tmp_path: Path, provider: str, capfd: pytest.CaptureFixture[str]
) -> None:
    devices = {device.ep_name for device in onnxruntime.get_ep_devices()}
    if provider in devices or torch.cuda.is_available():
        pytest.skip(f"{provider} may well be here")
    profile = (find_shared("export/profiles") / "cpu-fp32.yaml").read_text()
    (tmp_path / "p.yaml").write_text(profile.replace("CPUExecutionProvider", provider))
    code = main(["export", str(exported[0]), f"profile={tmp_path / 'p.yaml'}", f"out={tmp_path / 'out'}"])
    printed = capfd.readouterr()
    assert code == 2
    assert printed.err.startswith(f"error: {'unknown' if 'NoSuch' in provider else 'the'} execution provider")
    assert len(printed.err.splitlines()) == 1  # ONNX Runtime's own account stays out
    assert "Falling back" not in printed.out
    assert not (tmp_path / "out").exists()
    with pytest.raises(MachineError):
        Package.open(exported[1], provider=provider)


def test_export__bad_input_is_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown profile"):
        api.export(bundle=str(exported[0]), profile="cpu-fp33", out=tmp_path / "out")
    code = write_bundle_of(tmp_path / "code", "tests.support_export:small_vit")
    with pytest.raises(ModelError, match="trust_code"):
        api.export(bundle=str(code), out=tmp_path / "out")
    save_bundle(
        tmp_path / "headless",
        build_network(describe_network("squeezenet1_1", 2), trust_code=False),
        BundleConfig(describe_network("squeezenet1_1", 2), (), SMALL),
    )
    with pytest.raises(RecipeError, match="output=features"):
        api.export(bundle=str(tmp_path / "headless"), out=tmp_path / "out")
    with pytest.raises(PackageError, match="no such folder"):
        api.parity(models=(str(tmp_path / "nothing"),))
    assert not (tmp_path / "out").exists()


@pytest.mark.realdata
def test_export__pretrained_network_on_photos(real_data: Path, tmp_path: Path) -> None:
    classes = tuple(sorted(folder.name for folder in (real_data / "photos" / "val").iterdir()))
    torch.manual_seed(0)
    start = start_model("squeezenet1_1", str(real_data / "models" / "squeezenet1_1.safetensors"), classes)
    save_bundle(tmp_path / "bundle", start.model.eval(), start.config)
    photos = str(real_data / "photos")
    outcome = api.export(bundle=str(tmp_path / "bundle"), out=tmp_path / "out", output="both", data=photos)
    assert outcome.values["samples"]["real"] == 16
    for output in outcome.values["outputs"]:
        assert not output["widened"]
        assert output["groups"][0]["max_relative"] < 1e-5
        assert not output["warnings"]
    models = (str(tmp_path / "bundle"), str(tmp_path / "out"))
    assert api.parity(models=models, data={"path": photos, "limit": 20}).passed
