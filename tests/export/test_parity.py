"""Parity finds planted faults, with the bundle and without it, with the hashes' help and against it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from tests.support import make_images
from tests.support_export import CLASSES, damage, edit_record, write_bundle_of
from tldist import api
from tldist.cli import main
from tldist.errors import BundleError, RecipeError
from tldist.files import sha256_file
from tldist.runtime.reference import read_reference, write_reference

Change = Callable[[onnx.ModelProto], None]


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Change an initialiser."""

    def apply(proto: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
        array = change(numpy_helper.to_array(tensor).copy())
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    return apply


def plus(place: tuple[int, ...], value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] += value
        return array

    return change


def other_activation(proto: onnx.ModelProto) -> None:
    next(node for node in proto.graph.node if "relu" in node.output).op_type = "Sigmoid"


@dataclass(frozen=True)
class Fault:
    """A change, and what names its place."""

    change: Change
    op: str
    value: str


FAULTS = {
    "one weight": Fault(edit("model.conv.weight", plus((5, 1, 1, 1), 0.05)), "Conv", "getitem_3"),
    "nan weight": Fault(edit("model.fc.weight", plus((0, 0), np.nan)), "Gemm", "logits"),
    "infinite activation": Fault(edit("model.stem.weight", plus((2, 0, 1, 1), 3e38)), "Conv", "getitem"),
    "swapped channels": Fault(edit("model.stem.weight", lambda array: array[:, ::-1]), "Conv", "getitem"),
    "wrong mean": Fault(edit("view", lambda array: array[:, ::-1]), "Sub", "sub_3"),
    "permuted classes": Fault(edit("model.fc.weight", lambda array: array[[1, 0, 2, 3]]), "Gemm", "logits"),
    "other activation": Fault(other_activation, "Sigmoid", "relu"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_parity__fault_in_the_graph_shows_in_its_answers(
    small: tuple[Path, Path], tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every hash was made to agree: the values alone give it away, and PyTorch names the node."""
    fault = FAULTS[name]
    copy = damage(small[1], tmp_path / "copy", fault.change, rehash=True)
    assert main(["parity", str(copy), "--json"]) == 1
    verdict = _verdict_of(capsys)
    assert not verdict["problems"]
    assert verdict["departure"] is None
    assert main(["parity", str(small[0]), str(copy), "trust_code=true", "--json"]) == 1
    verdict = _verdict_of(capsys)
    assert not verdict["problems"]
    departure = verdict["departure"]
    assert (departure["stage"], departure["op"], departure["value"]) == ("graph", fault.op, fault.value)
    assert departure["why"]


def _verdict_of(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    lines = capsys.readouterr().out.splitlines()
    assert "parity: FAIL" in lines
    found: dict[str, Any] = json.loads(
        lines[-1], parse_constant=lambda text: pytest.fail(f"{text} is not JSON")
    )
    return found


def test_parity__the_text_names_the_node_before_the_verdict(small: tuple[Path, Path], tmp_path: Path) -> None:
    fault = FAULTS["nan weight"]
    copy = damage(small[1], tmp_path / "copy", fault.change, rehash=True)
    outcome = api.parity(models=(str(small[0]), str(copy)), trust_code=True)
    assert not outcome.passed
    text = outcome.text.splitlines()
    assert text[-1] == "parity: FAIL"
    assert any(line.startswith("first departure: Gemm node 'fc/Gemm' of module model.fc") for line in text)
    assert "package nan" in outcome.text
    assert "the package's output is NaN or infinite on 65 of 65 rows" in outcome.text


@pytest.mark.parametrize("inside", [False, True], ids=["input", "reshape"])
def test_parity__fixed_batch_fails(small: tuple[Path, Path], tmp_path: Path, inside: bool) -> None:
    def fix(proto: onnx.ModelProto) -> None:
        if not inside:
            for value in (*proto.graph.input, *proto.graph.output):
                value.type.tensor_type.shape.dim[0].dim_value = 1
            return
        node = next(node for node in proto.graph.node if node.op_type == "Reshape")
        proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 8]), "one"))
        node.input[1] = "one"
        del proto.graph.value_info[:]

    copy = damage(small[1], tmp_path / "copy", fix, rehash=True)
    for models in ((str(copy),), (str(small[0]), str(copy))):
        outcome = api.parity(models=models, trust_code=True)
        assert not outcome.passed
        assert outcome.text.splitlines()[-1] == "parity: FAIL"
        assert ("fails at batch size 2" if inside else "uint8 (batch, H, W, 3)") in outcome.text


def _edit_certificate(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the certificate, its hash in the record too."""
    certificate = json.loads((package / "parity.json").read_text())
    change(certificate)
    (package / "parity.json").write_text(json.dumps(certificate))
    edit_record(package, files={"parity.json": sha256_file(package / "parity.json")})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["files"].update({"model.onnx": "0" * 64}), "certifies another graph"),
        (lambda c: c["files"].update({"reference.safetensors": "0" * 64}), "certifies another graph"),
        (lambda c: c["files"].update({"model.onnx.data": "0" * 64}), "certifies another graph"),
        (lambda c: c["bundle"].update(identity="0" * 64), "another bundle"),
        (lambda c: c.update(parity="FAIL"), "says that parity failed"),
        (lambda c: c["profile"]["tolerances"].update(max_relative=1.0), "certifies another profile"),
        (lambda c: c.update(files=[]), "not a parity report"),
    ],
    ids=["graph", "samples", "data", "bundle", "failed", "profile", "format"],
)
def test_parity__stale_certificate_fails(
    small: tuple[Path, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    copy = Path(shutil.copytree(small[1], tmp_path / "copy"))
    _edit_certificate(copy, change)
    outcome = api.parity(models=(str(copy),))
    assert not outcome.passed
    assert [problem for problem in outcome.values["problems"] if words in problem]
    assert all(part["passed"] for part in outcome.values["outputs"])


def test_parity__certificate_says_what_was_measured_on_what(small: tuple[Path, Path]) -> None:
    certificate = json.loads((small[1] / "parity.json").read_text())
    record = json.loads((small[1] / "package.json").read_text())
    assert certificate["files"] == {
        name: sha256_file(small[1] / name) for name in ("model.onnx", "reference.safetensors")
    }
    assert certificate["bundle"] == record["bundle"]
    assert (certificate["precision"], certificate["optimization"]) == ("fp32", "ORT_ENABLE_ALL")
    assert certificate["provider"] == "CPUExecutionProvider"
    assert certificate["onnxruntime"] == onnxruntime.__version__
    assert certificate["versions"]["torch"] == importlib.metadata.version("torch")
    assert certificate["machine"]["architecture"] == platform.machine()


def test_parity__another_cpu_is_named_where_the_answers_differ(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    """What the package answered where it was made is part of the comparison."""
    copy = Path(shutil.copytree(small[1], tmp_path / "copy"))
    reference = read_reference(copy / "reference.safetensors")
    assert set(reference.exported) == {"logits", "probabilities"}
    reference.exported["logits"][2] *= 1.01
    write_reference(copy / "reference.safetensors", reference)
    digest = sha256_file(copy / "reference.safetensors")
    edit_record(copy, files={"reference.safetensors": digest})

    def elsewhere(certificate: dict[str, Any]) -> None:
        certificate["files"]["reference.safetensors"] = digest
        certificate["machine"] = {"cpu": "Another CPU", "features": ["avx9"]}

    _edit_certificate(copy, elsewhere)
    outcome = api.parity(models=(str(copy),))
    assert not outcome.passed
    assert "answers otherwise here than where it was made" in outcome.text
    assert "made on Another CPU; this machine is" in outcome.text
    assert "without avx9" in outcome.text


def test_parity__untouched_passes_both_ways(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, package = exported
    photos = make_images(tmp_path / "photos", {"a": 6, "b": 6})
    assert main(["parity", str(package), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "parity: PASS" in lines
    verdict = json.loads(lines[-1])
    assert (verdict["status"], verdict["parity"]) == ("done", "PASS")
    assert main(["parity", str(bundle), str(package)]) == 0
    assert main(["parity", str(bundle), str(package), f"data={photos}", "data.limit=9"]) == 0
    assert "9 real, 1 black, 1 white, 5 noise; batch 1, 2, 7, 32" in capsys.readouterr().out


def test_parity__bad_hash_alone_is_exit_1_and_the_comparison_goes_on(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damage(
        exported[1], tmp_path / "copy", lambda proto: setattr(proto, "doc_string", "x"), rehash=False
    )
    assert main(["parity", str(copy)]) == 1
    printed = capsys.readouterr().out
    assert "model.onnx: its SHA-256 differs" in printed
    assert "logits" in printed
    assert printed.splitlines()[-1] == "parity: FAIL"


@pytest.mark.parametrize("keep", [0, 1000, 0.5])
def test_parity__truncated_graph_fails(exported: tuple[Path, Path], tmp_path: Path, keep: float) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    assert main(["parity", str(copy)]) == 1
    assert main(["parity", str(exported[0]), str(copy)]) == 1


@pytest.mark.parametrize("name", ["model.onnx", "reference.safetensors", "parity.json"])
def test_parity__missing_file_fails(exported: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    (copy / name).unlink()
    outcome = api.parity(models=(str(copy),))
    assert not outcome.passed
    assert name in outcome.text


@pytest.mark.parametrize(
    "record",
    [
        {"classes": [CLASSES[1], CLASSES[0], *CLASSES[2:]]},
        {"outputs": {"features": 512, "logits": 4}},
        {"bundle": {"identity": "0" * 64, "weights": "0" * 64}},
    ],
    ids=["permuted classes", "permuted outputs", "another bundle"],
)
def test_parity__record_that_contradicts_the_graph_fails(
    exported: tuple[Path, Path], tmp_path: Path, record: dict[str, object]
) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    edit_record(copy, **record)
    assert main(["parity", str(copy)]) == 1
    assert main(["parity", str(exported[0]), str(copy)]) == 1


def test_parity__classes_permuted_everywhere_are_found_by_the_bundle(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    wrong = [CLASSES[1], CLASSES[0], *CLASSES[2:]]

    def permute(proto: onnx.ModelProto) -> None:
        for entry in proto.metadata_props:
            if entry.key == "classes":
                entry.value = json.dumps(wrong, ensure_ascii=False)

    copy = damage(exported[1], tmp_path / "copy", permute)
    edit_record(copy, classes=wrong)
    outcome = api.parity(models=(str(exported[0]), str(copy)))
    assert not outcome.passed
    assert "class names differ" in outcome.text


def test_parity__another_preprocessing_is_found(exported: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    how = json.loads((copy / "package.json").read_text())["preprocessing"]
    edit_record(copy, preprocessing={**how, "mean": how["mean"][::-1]})
    for models in ((str(copy),), (str(exported[0]), str(copy))):
        outcome = api.parity(models=models)
        assert not outcome.passed
        assert "preprocessing" in outcome.text


def test_parity__another_bundle_of_the_same_shape_fails(exported: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_bundle_of(tmp_path / "other", "squeezenet1_1", seed=7)
    outcome = api.parity(models=(str(other), str(exported[1])))
    assert not outcome.passed
    assert "relative error" in outcome.text
    assert "another bundle" in outcome.text


def test_parity__changed_bundle_fails_by_hash_and_value(exported: tuple[Path, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(exported[0], tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors["features.0.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors")
    outcome = api.parity(models=(str(copy), str(exported[1])))
    assert not outcome.passed
    assert "SHA-256" in outcome.text
    assert "relative error" in outcome.text


def test_parity__wrong_inputs_are_named(exported: tuple[Path, Path], tmp_path: Path) -> None:
    bundle, package = map(str, exported)
    with pytest.raises(RecipeError, match="wrong order"):
        api.parity(models=(package, bundle))
    with pytest.raises(RecipeError, match="found 3 inputs"):
        api.parity(models=(bundle, package, package))
    with pytest.raises(RecipeError, match="needs the bundle"):
        api.parity(models=(package,), data="photos")
    with pytest.raises(BundleError, match="not a bundle"):
        api.parity(models=(package, package))
    assert main(["parity", bundle]) == 2
    assert main(["parity"]) == 2
