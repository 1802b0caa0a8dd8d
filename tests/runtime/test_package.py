"""The runtime: open a package, trust it or not, and predict."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import squeezenet1_1

from tests.embed.tiny import tiny_package
from tests.support import encode, make_images
from tests.support_export import CLASSES, SMALL, damage, edit_record
from tldist.errors import MachineError, PackageError
from tldist.runtime.decode import BadImage
from tldist.runtime.package import Package, PackageConfig, is_package, read_package, write_package
from tldist.runtime.predict import predict, probabilities
from tldist.runtime.preprocess import prepare
from tldist.runtime.session import open_session, require_provider


@pytest.fixture(scope="module")
def package(exported: tuple[Path, Path]) -> Package:
    return Package.open(exported[1], threads=1)


def test_package__says_what_it_is(package: Package, exported: tuple[Path, Path]) -> None:
    assert is_package(exported[1])
    assert not is_package(exported[0])
    assert package.config.classes == CLASSES
    assert package.config.preprocessing == SMALL
    assert package.config.outputs == {"logits": 4, "features": 512}
    assert package.config.profile_name == "cpu-fp32"
    assert package.session.provider == "CPUExecutionProvider"
    assert len(package.config.identity) == 64


def test_package__rows_do_not_depend_on_the_batch(package: Package) -> None:
    images = np.random.default_rng(0).integers(0, 256, (9, 40, 40, 3), dtype=np.uint8)
    whole = package.run(images)
    assert whole["logits"].dtype == np.float32
    for start in range(9):
        single = package.run(images[start : start + 1])
        np.testing.assert_allclose(single["features"][0], whole["features"][start], rtol=1e-5, atol=1e-5)
    assert package.run(images[:0])["features"].shape == (0, 512)
    strided = package.run(images[:, :, ::-1])  # a view with negative strides
    np.testing.assert_array_equal(strided["logits"], package.run(images[:, :, ::-1].copy())["logits"])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 40, 40, 3), np.float32),
        np.zeros((2, 40, 41, 3), np.uint8),
        np.zeros((40, 40, 3), np.uint8),
        np.zeros((2, 3, 40, 40), np.uint8),
    ],
)
def test_package__other_images_are_refused(package: Package, images: np.ndarray) -> None:
    with pytest.raises(PackageError, match=r"expected uint8 images \(N, 40, 40, 3\)"):
        package.run(images)


def test_predict__paths_bytes_and_arrays(
    package: Package, exported: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = make_images(tmp_path, {"a": 5})
    paths = sorted(folder.glob("a/*.png"))
    arrays = [np.asarray(Image.open(path)) for path in paths]
    found = predict(package, paths, batch_size=2)
    same = predict(package, [paths[0].read_bytes(), arrays[1], str(paths[2])])
    for one, other in zip(same, found):
        assert one.label == other.label
        assert one.probability == pytest.approx(other.probability, abs=1e-5)
    model = squeezenet1_1(num_classes=4).eval()
    model.load_state_dict(load_file(exported[0] / "model.safetensors"))
    pixels = np.stack([prepare(path.read_bytes(), SMALL) for path in paths])
    scaled = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        expected = torch.softmax(model(torch.from_numpy(scaled.transpose(0, 3, 1, 2)).float()), 1).numpy()
    for prediction, row in zip(found, expected):
        assert prediction.label == CLASSES[row.argmax()]
        assert prediction.probability == pytest.approx(row.max(), abs=1e-5)
        assert [name for name, _ in prediction.top] == [CLASSES[place] for place in np.argsort(-row)]
        assert sum(share for _, share in prediction.top) == pytest.approx(1)
    assert predict(package, []) == []


def test_predict__bad_source_is_named(package: Package, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"broken\.jpg"):
        predict(package, [tmp_path / "broken.jpg"])
    good = encode(np.zeros((9, 9, 3), np.uint8))
    with pytest.raises(BadImage, match="source 2"):
        predict(package, [good, good, good[:30]], batch_size=2)
    with pytest.raises(BadImage, match=r"uint8 \(H, W, 3\)"):
        predict(package, [np.zeros((9, 9), np.uint8)])


def test_probabilities__large_logits_do_not_overflow() -> None:
    found = probabilities({"logits": np.array([[1000.0, 0.0], [-1000.0, -1000.0]], np.float32)})
    np.testing.assert_allclose(found, [[1, 0], [0.5, 0.5]])


@pytest.mark.parametrize("name", ["model.onnx", "reference.safetensors", "parity.json"])
def test_open__changed_or_missing_file_is_refused(
    exported: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(PackageError, match=f"{name}.*SHA-256"):
        Package.open(copy)
    (copy / name).unlink()
    with pytest.raises(PackageError, match=f"{name}: missing"):
        Package.open(copy)


def test_open__external_data_is_part_of_the_package(tmp_path: Path) -> None:
    package = tiny_package(tmp_path / "p", np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32))
    whole = Package.open(package)
    proto = onnx.load(package / "model.onnx")
    data = "model.onnx.data"
    onnx.save(proto, package / "model.onnx", save_as_external_data=True, location=data, size_threshold=60)
    config = write_package_again(package)
    assert set(config.files) == {"model.onnx", data, "reference.safetensors", "parity.json"}
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        Package.open(package).run(images)["features"], whole.run(images)["features"]
    )
    weights = bytearray((package / data).read_bytes())
    weights[-1] ^= 1
    (package / data).write_bytes(weights)
    with pytest.raises(PackageError, match=r"model\.onnx\.data.*SHA-256"):
        Package.open(package)


@pytest.mark.parametrize("name", ["max_cpu_nodes", "provider_options", "tolerances"])
def test_open__a_profile_that_makes_no_sense_is_refused(tmp_path: Path, name: str) -> None:
    package = tiny_package(tmp_path / "p", np.zeros((3, 4), np.float32))
    profile = json.loads((package / "package.json").read_text())["profile"]
    edit_record(package, profile=profile | {name: "anything"})
    with pytest.raises(PackageError, match=f"the profile's {name} is 'anything'"):
        Package.open(package)


def write_package_again(package: Path) -> PackageConfig:
    config = read_package(package, verify=False)
    return write_package(package, config)


def test_open__truncated_graph_is_refused_also_unverified(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    (copy / "model.onnx").write_bytes((copy / "model.onnx").read_bytes()[:100_000])
    with pytest.raises(PackageError, match="SHA-256"):
        Package.open(copy)
    with pytest.raises(PackageError, match="damaged"):
        Package.open(copy, verify=False)


def test_open__record_that_contradicts_the_graph_is_refused(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    edit_record(copy, classes=list(CLASSES[::-1]))
    with pytest.raises(PackageError, match="classes"):
        Package.open(copy)
    bare = damage(exported[1], tmp_path / "bare", lambda proto: proto.ClearField("metadata_props"))
    with pytest.raises(PackageError, match="metadata"):
        Package.open(bare)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read|not a package configuration"),
        ("{}", "not a package configuration"),
        ('{"format": "x"}', "not a package configuration"),
    ],
)
def test_read_package__malformed_record(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "package.json").write_text(text)
    with pytest.raises(PackageError, match=words):
        read_package(tmp_path)


def test_read_package__newer_format_and_foreign_paths(exported: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    edit_record(copy, files={"../secret": "0" * 64})
    with pytest.raises(PackageError, match="outside"):
        read_package(copy)
    edit_record(copy, format="tldist.package/2")
    with pytest.raises(PackageError, match=r"tldist\.package/2"):
        read_package(copy, verify=False)
    with pytest.raises(PackageError, match="not a package"):
        read_package(exported[0])
    with pytest.raises(PackageError, match="no such folder"):
        read_package(tmp_path / "nothing")


def graph(path: Path, name: str, kind: int, shape: list[object]) -> Path:
    value = helper.make_tensor_value_info(name, kind, shape)
    out = helper.make_tensor_value_info("y", kind, shape)
    node = helper.make_node("Identity", [name], ["y"])
    proto = helper.make_graph([node], "g", [value], [out])
    onnx.save(helper.make_model(proto, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "shape"),
    [
        ("x", TensorProto.UINT8, ["batch", 8, 8, 3]),
        ("images", TensorProto.FLOAT, ["batch", 8, 8, 3]),
        ("images", TensorProto.UINT8, [1, 8, 8, 3]),
        ("images", TensorProto.UINT8, ["batch", 8, 8, 3]),  # its output is no vector
    ],
)
def test_open_session__foreign_graph_is_refused(
    tmp_path: Path, name: str, kind: int, shape: list[object]
) -> None:
    with pytest.raises(PackageError, match="expected"):
        open_session(graph(tmp_path / "g.onnx", name, kind, shape), threads=1)


def test_require_provider__the_cpu_is_there_and_wrong_names_get_close_ones() -> None:
    require_provider("CPUExecutionProvider")
    with pytest.raises(MachineError, match="Did you mean: CPUExecutionProvider"):
        require_provider("CPUExecutionProvidr")
    with pytest.raises(MachineError, match="is not part of"):
        require_provider("CoreMLExecutionProvider")


def test_package__record_is_plain_json(exported: tuple[Path, Path]) -> None:
    record = json.loads((exported[1] / "package.json").read_text(encoding="utf-8"))
    assert record["format"] == "tldist.package/1"
    assert record["lineage"]["parents"][0]["identity"] == record["bundle"]["identity"]
