"""Parity finds planted faults, with the bundle and without it, with the hashes' help and against it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from tests.support import make_images
from tests.support_export import CLASSES, damage, edit_record, write_bundle_of
from tldist import api
from tldist.cli import main
from tldist.errors import BundleError, RecipeError

Change = Callable[[onnx.ModelProto], None]


def _initializer(proto: onnx.ModelProto, shape: tuple[int, ...]) -> onnx.TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tuple(tensor.dims) == shape)


def _edit(tensor: onnx.TensorProto, edit: Callable[[np.ndarray], np.ndarray]) -> None:
    array = numpy_helper.to_array(tensor).copy()
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(edit(array)), tensor.name))


def one_weight(proto: onnx.ModelProto) -> None:
    def edit(array: np.ndarray) -> np.ndarray:
        array[5, 1, 1, 1] += 0.05
        return array

    _edit(_initializer(proto, (64, 3, 3, 3)), edit)


def nan_weight(proto: onnx.ModelProto) -> None:
    def edit(array: np.ndarray) -> np.ndarray:
        array[0, 0, 0, 0] = np.nan
        return array

    _edit(_initializer(proto, (4, 512, 1, 1)), edit)


def swapped_channels(proto: onnx.ModelProto) -> None:
    _edit(_initializer(proto, (64, 3, 3, 3)), lambda array: array[:, ::-1])


def wrong_mean(proto: onnx.ModelProto) -> None:
    means = [t for t in proto.graph.initializer if tuple(t.dims) == (1, 3, 1, 1)]
    means = [t for t in means if np.allclose(numpy_helper.to_array(t).ravel(), [0.485, 0.456, 0.406])]
    _edit(means[0], lambda array: array[:, ::-1])


def permuted_outputs(proto: onnx.ModelProto) -> None:
    _edit(_initializer(proto, (4, 512, 1, 1)), lambda array: array[[1, 0, 2, 3]])


FAULTS = [one_weight, nan_weight, swapped_channels, wrong_mean, permuted_outputs]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
@pytest.mark.parametrize("with_bundle", [False, True], ids=["stored", "pytorch"])
def test_parity__fault_in_the_graph_shows_in_its_answers(
    exported: tuple[Path, Path], tmp_path: Path, fault: Change, with_bundle: bool
) -> None:
    """Every hash was made to agree: the values alone give it away."""
    bundle, package = exported
    copy = damage(package, tmp_path / "copy", fault, rehash=True)
    outcome = api.parity(models=(str(bundle), str(copy)) if with_bundle else (str(copy),))
    assert not outcome.passed
    assert not outcome.values["problems"]
    assert outcome.text.splitlines()[-1] == "parity: FAIL"
    if fault is nan_weight:
        assert "NaN" in outcome.text
    json.loads(outcome.to_json(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))


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
