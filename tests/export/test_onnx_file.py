"""Graphs as files: one, or one with its weights beside it, which packages hold and check alike."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from tests.export.test_export import noise
from tldist.errors import PackageError
from tldist.export.onnx_file import opset_of, save, weight_bytes
from tldist.runtime.package import Package, read_package, write_package


def test_save__weights_beside_the_graph_in_a_package(exported: tuple[Path, Path], tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(exported[1], package)
    proto = onnx.load(package / "model.onnx")
    before = proto.SerializeToString()
    save(proto, package / "model.onnx", largest=1000)
    assert proto.SerializeToString() == before  # it keeps its weights
    assert (package / "model.onnx").stat().st_size < 100_000
    assert (package / "model.onnx.data").stat().st_size > 2_500_000
    onnx.checker.check_model(package / "model.onnx", full_check=True)
    before_identity = read_package(package, verify=False).identity
    config = write_package(package, read_package(package, verify=False))
    assert set(config.files) > {"model.onnx", "model.onnx.data"}
    assert config.identity != before_identity

    opened = Package.open(package, threads=1)
    expected = Package.open(exported[1], threads=1).run(noise(3))
    for name, values in opened.run(noise(3)).items():
        np.testing.assert_array_equal(values, expected[name])
    with (package / "model.onnx.data").open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\x00\x80\x3f")
    with pytest.raises(PackageError, match=r"model.onnx.data"):
        Package.open(package)


def test_save__metadata_and_sizes(exported: tuple[Path, Path], tmp_path: Path) -> None:
    proto = onnx.load(exported[1] / "model.onnx")
    floats = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer if tensor.data_type == 1)
    longs = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer if tensor.data_type == 7)
    assert weight_bytes(proto) == 4 * floats + 8 * longs
    assert opset_of(proto) == 20
    for number, largest in enumerate((10**9, 1000)):
        path = tmp_path / f"{number}.onnx"
        save(proto, path, {"classes": '["robe d\'été"]'}, largest=largest)
        found = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        assert found == {"classes": '["robe d\'été"]'}
        assert path.with_name(f"{number}.onnx.data").exists() == (largest == 1000)
