"""The self-test at start: a package that computes something else here is refused, in words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.embed.tiny import tiny_package
from tests.support_export import damage, edit_record
from tldist.errors import PackageError
from tldist.files import sha256_file
from tldist.runtime.package import Package
from tldist.runtime.reference import Reference, read_reference, write_reference
from tldist.runtime.selftest import Part

WEIGHTS = np.random.default_rng(5).normal(size=(3, 6)).astype(np.float32)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return tiny_package(tmp_path / "tiny", WEIGHTS)


def change_weights(proto: onnx.ModelProto, factor: float) -> None:
    """Multiply one weight of the last product."""
    weights = proto.graph.initializer[-1]
    values = numpy_helper.to_array(weights).copy()
    values[0, 2] *= factor
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))


def set_reference(package: Path, reference: Reference, **tolerances: Any) -> Path:
    """Replace a package's samples and tolerances; its records agree with the new file."""
    write_reference(package / "reference.safetensors", reference)
    record = json.loads((package / "package.json").read_text())
    digest = sha256_file(package / "reference.safetensors")
    profile = record["profile"]
    profile["tolerances"] |= tolerances
    edit_record(package, files={"reference.safetensors": digest}, profile=profile)
    return package


@pytest.mark.parametrize("factor", [1.01, -1.0, float("nan"), float("inf")])
def test_self_test__one_changed_weight_is_found(tiny: Path, tmp_path: Path, factor: float) -> None:
    """All hashes agree, so nothing but running the graph can tell."""
    copy = damage(tiny, tmp_path / "copy", lambda proto: change_weights(proto, factor))
    with pytest.raises(PackageError, match=r"self-test failed.*'features' is off by .* on generated samples"):
        Package.open(copy)
    opened = Package.open(copy, self_test=False)
    with pytest.raises(PackageError, match=r"tldist parity"):
        opened.self_test()


def test_self_test__of_an_exported_network(exported: tuple[Path, Path], tmp_path: Path) -> None:
    Package.open(exported[1], threads=1).self_test(samples=None)

    def swap_channels(proto: onnx.ModelProto) -> None:
        kernel = next(t for t in proto.graph.initializer if len(t.dims) == 4 and t.dims[1] == 3)
        values = numpy_helper.to_array(kernel)[:, ::-1].copy()
        kernel.CopyFrom(numpy_helper.from_array(values, kernel.name))

    copy = damage(exported[1], tmp_path / "copy", swap_channels)
    with pytest.raises(PackageError, match=r"'logits' is off.*'features' is off"):
        Package.open(copy, threads=1)


def test_self_test__the_packages_own_answers_come_first(tiny: Path) -> None:
    """PyTorch's answers may differ by the profile's tolerance; what the package gave, by max_drift."""
    reference = read_reference(tiny / "reference.safetensors")
    right = reference.expected["features"]
    off = right + np.float32(1e-3) * np.abs(right).max()
    set_reference(tiny, replace(reference, expected={"features": off}, exported={"features": right}))
    Package.open(tiny)
    set_reference(tiny, replace(reference, exported={"features": off}))
    with pytest.raises(PackageError, match="self-test failed"):
        Package.open(tiny)
    set_reference(tiny, replace(reference, exported={"features": off}), max_drift=2e-3)
    Package.open(tiny)


def test_self_test__pytorchs_own_error_widens_the_tolerance(tiny: Path) -> None:
    reference = read_reference(tiny / "reference.safetensors")
    right = reference.expected["features"]
    size = np.abs(right).max()
    off = {"features": right + np.float32(1e-3) * size}
    near = {"features": off["features"].astype(np.float64) + 1e-5 * size}
    far = {"features": off["features"].astype(np.float64) + 1e-3 * size}
    set_reference(tiny, replace(reference, expected=off, referee=near))
    with pytest.raises(PackageError, match="self-test failed"):
        Package.open(tiny)
    set_reference(tiny, replace(reference, expected=off, referee=far))
    Package.open(tiny)


def test_self_test__extremes_that_are_only_reported_must_be_finite(tiny: Path, tmp_path: Path) -> None:
    reference = read_reference(tiny / "reference.safetensors")
    samples = replace(reference.samples, groups=(("real", 2), ("noise", 1)))
    off = reference.expected["features"].copy()
    off[2] *= 1.5
    set_reference(tiny, Reference(samples, {"features": off}))
    with pytest.raises(PackageError, match="on noise samples"):
        Package.open(tiny)
    set_reference(tiny, Reference(samples, {"features": off}), extremes="reported")
    Package.open(tiny)
    copy = damage(tiny, tmp_path / "copy", lambda proto: change_weights(proto, float("inf")))
    with pytest.raises(PackageError, match="on noise samples"):
        Package.open(copy)


def test_self_test__another_resize_widens_the_tolerance(tiny: Path) -> None:
    reference = read_reference(tiny / "reference.safetensors")
    right = reference.expected["features"]
    off = {"features": right + np.float32(1e-3) * np.abs(right).max()}
    set_reference(tiny, replace(reference, exported=off, fitted={"features": right}))
    with pytest.raises(PackageError, match="self-test failed"):
        Package.open(tiny)
    set_reference(tiny, replace(reference, exported=off, fitted=off))
    Package.open(tiny)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 40.0])
def test_part__probabilities_may_be_off_by_what_the_logits_may(tiny: Path, temperature: float) -> None:
    """Half of the logits' tolerance, in units of a logit, over the temperature; against random changes."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 6), scale=4)
    names = {"logits": logits, "probabilities": softmax(logits / temperature)}
    reference = replace(read_reference(tiny / "reference.safetensors"), expected=names)
    rows = np.ones(3, bool)
    part = Part(reference, "probabilities", rows, {"max_relative": 0.01}, temperature)
    change = 0.01 * np.abs(logits).max()
    assert part.magnitude == 1
    assert part.limit == pytest.approx(max(0.01, 0.5 * change / temperature))
    for _ in range(200):
        moved = softmax((logits + random.choice([-change, change], logits.shape)) / temperature)
        assert np.abs(moved - names["probabilities"]).max() <= part.limit


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values)
    return powers / powers.sum(1, keepdims=True)


def test_self_test__each_group_has_a_magnitude_of_its_own(tiny: Path) -> None:
    """An error that is nothing beside the large values of one group is much for another."""
    reference = read_reference(tiny / "reference.safetensors")
    images = reference.samples.images.copy()
    images[0] //= 100
    samples = replace(reference.samples, images=images, groups=(("real", 1), ("noise", 2)))
    right = images.mean((1, 2)).astype(np.float32) @ WEIGHTS
    right[0] += np.float32(2e-4) * np.abs(right[0]).max()
    set_reference(tiny, Reference(samples, {"features": right}), max_relative=1e-4)
    with pytest.raises(PackageError, match=r"on real samples, tolerance 1\.0e-04"):
        Package.open(tiny)


def test_self_test__what_does_not_belong_together_is_said(tiny: Path, tmp_path: Path) -> None:
    reference = read_reference(tiny / "reference.safetensors")
    set_reference(tiny, replace(reference, expected={"logits": reference.expected["features"]}))
    with pytest.raises(PackageError, match="do not belong together"):
        Package.open(tiny)
    other = tiny_package(tmp_path / "other", WEIGHTS)
    edit_record(other, profile={"name": "mine"})
    copy = damage(other, tmp_path / "copy", lambda proto: onnx.helper.set_model_props(proto, own(proto)))
    with pytest.raises(PackageError, match="no tolerances"):
        Package.open(copy)
    shutil.copy(tiny / "parity.json", other / "reference.safetensors")
    with pytest.raises(PackageError, match="cannot be read as reference"):
        Package.open(other, verify=False)


def own(proto: onnx.ModelProto) -> dict[str, str]:
    """The graph's metadata with the other profile's name."""
    return {entry.key: entry.value for entry in proto.metadata_props} | {"profile": "mine"}
