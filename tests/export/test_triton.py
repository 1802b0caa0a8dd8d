"""The Triton model repository, read with Triton's own definition of its format."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format

from tests.support import run_python
from tests.support_export import CLASSES, damage, edit_record
from tldist.errors import PackageError
from tldist.export.triton import write_triton
from tldist.files import sha256_file
from tldist.runtime.package import Package

TYPES = {"TYPE_UINT8": onnx.TensorProto.UINT8, "TYPE_FP32": onnx.TensorProto.FLOAT}


@pytest.fixture(scope="session")
def triton() -> ModuleType:
    """Triton's ``model_config_pb2``, without the gRPC client that it comes with."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    found = importlib.util.spec_from_file_location("model_config_pb2", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def read_config(triton: ModuleType, model: Path) -> Any:
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), triton.ModelConfig())


def dims_of(value: onnx.ValueInfoProto) -> list[int]:
    """Of a tensor in the ONNX file, the batch left out; -1: any."""
    dims = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else -1 for size in dims][1:]


def assert_describes(triton: ModuleType, config: Any, graph: onnx.GraphProto) -> None:
    for found, expected in ((config.input, graph.input), (config.output, graph.output)):
        assert [value.name for value in found] == [value.name for value in expected]
        for mine, true in zip(found, expected):
            assert list(mine.dims) == dims_of(true)
            name = triton.DataType.Name(mine.data_type)
            assert TYPES[name] == true.type.tensor_type.elem_type


def test_triton__describes_the_graph(exported: tuple[Path, Path], tmp_path: Path, triton: ModuleType) -> None:
    model = write_triton(exported[1], tmp_path / "models", name="clothes", max_batch=16, max_delay_ms=2.5)
    assert model == tmp_path / "models" / "clothes"
    config = read_config(triton, model)
    assert_describes(triton, config, onnx.load(exported[1] / "model.onnx").graph)
    assert (config.name, config.backend, config.max_batch_size) == ("clothes", "onnxruntime", 16)
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 16]
    assert config.dynamic_batching.max_queue_delay_microseconds == 2500
    [group] = config.instance_group
    assert (group.kind, group.count) == (triton.ModelInstanceGroup.KIND_CPU, 1)
    assert not config.HasField("optimization")
    assert config.parameters["tldist.package"].string_value == Package.open(exported[1]).config.identity


def test_triton__labels_are_the_classes_in_order(
    exported: tuple[Path, Path], tmp_path: Path, triton: ModuleType
) -> None:
    model = write_triton(exported[1], tmp_path)
    files = {value.name: value.label_filename for value in read_config(triton, model).output}
    assert files == {"logits": "labels.txt", "features": ""}
    assert tuple((model / "labels.txt").read_text(encoding="utf-8").splitlines()) == CLASSES


def test_triton__the_copied_graph_answers_the_warm_up(
    exported: tuple[Path, Path], tmp_path: Path, triton: ModuleType
) -> None:
    model = write_triton(exported[1], tmp_path, max_batch=8)
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    config = read_config(triton, model)
    assert [warm.batch_size for warm in config.model_warmup] == [1, 2, 8]
    for warm in config.model_warmup:
        [(name, value)] = warm.inputs.items()
        assert value.zero_data
        assert value.data_type == config.input[0].data_type
        images = np.zeros((warm.batch_size, *value.dims), np.uint8)
        answers = session.run([value.name for value in config.output], {name: images})
        assert [list(answer.shape[1:]) for answer in answers] == [list(v.dims) for v in config.output]


def free_the_size(proto: onnx.ModelProto) -> None:
    for axis, name in ((1, "height"), (2, "width")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name


@pytest.mark.parametrize(("kind", "side"), [("dynamic", 40), ("picture", 46)])
def test_triton__any_height_and_width(
    exported: tuple[Path, Path], tmp_path: Path, triton: ModuleType, kind: str, side: int
) -> None:
    package = damage(exported[1], tmp_path / "package", free_the_size)
    edit_record(package, input=kind)
    config = read_config(triton, write_triton(package, tmp_path / "models"))
    assert_describes(triton, config, onnx.load(package / "model.onnx").graph)
    assert list(config.input[0].dims) == [-1, -1, 3]
    assert list(config.model_warmup[0].inputs["images"].dims) == [side, side, 3]


def with_provider(package: Path, copy: Path, provider: str, **options: str) -> Path:
    shutil.copytree(package, copy)
    profile = json.loads((copy / "package.json").read_text())["profile"]
    edit_record(copy, profile={**profile, "provider": provider, "provider_options": options})
    return copy


def accelerator(triton: ModuleType, model: Path) -> tuple[str, dict[str, str]]:
    config = read_config(triton, model)
    [group] = config.instance_group
    assert group.kind == triton.ModelInstanceGroup.KIND_GPU
    [found] = config.optimization.execution_accelerators.gpu_execution_accelerator
    return found.name, dict(found.parameters)


def test_triton__cuda_options(
    exported: tuple[Path, Path], tmp_path: Path, triton: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    package = with_provider(
        exported[1],
        tmp_path / "package",
        "CUDAExecutionProvider",
        cudnn_conv_use_max_workspace="1",
        enable_cuda_graph="1",
    )
    found = accelerator(triton, write_triton(package, tmp_path / "models"))
    assert found == ("cuda", {"cudnn_conv_use_max_workspace": "1"})
    assert "enable_cuda_graph" in capsys.readouterr().err


def test_triton__tensorrt_options_under_tritons_names(
    exported: tuple[Path, Path], tmp_path: Path, triton: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    package = with_provider(
        exported[1],
        tmp_path / "package",
        "TensorrtExecutionProvider",
        trt_fp16_enable="True",
        trt_max_workspace_size="1073741824",
        trt_engine_cache_enable="1",
        trt_engine_cache_path='/models/"cache"',
        trt_strange_option="1",
    )
    found = accelerator(triton, write_triton(package, tmp_path / "models"))
    assert found == (
        "tensorrt",
        {
            "precision_mode": "FP16",
            "max_workspace_size_bytes": "1073741824",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": '/models/"cache"',
        },
    )
    warning = capsys.readouterr().err
    assert "trt_strange_option" in warning
    assert "trt_fp16_enable" not in warning


def test_triton__of_a_provider_that_it_lacks(exported: tuple[Path, Path], tmp_path: Path) -> None:
    package = with_provider(exported[1], tmp_path / "package", "CoreMLExecutionProvider")
    with pytest.raises(PackageError, match="CoreMLExecutionProvider"):
        write_triton(package, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_triton__replaces_its_own_model_and_no_other(exported: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.pbtxt").write_text('name: "theirs"\n')
    with pytest.raises(PackageError, match="did not write it"):
        write_triton(exported[1], tmp_path, name="theirs")
    mine = write_triton(exported[1], tmp_path, name="mine", max_batch=4)
    write_triton(exported[1], tmp_path, name="mine", max_batch=8)
    assert "max_batch_size: 8" in (mine / "config.pbtxt").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "theirs"]


def test_triton__external_data_is_copied(exported: tuple[Path, Path], tmp_path: Path) -> None:
    package = tmp_path / "package"
    shutil.copytree(exported[1], package)
    file = package / "model.onnx"
    onnx.save(onnx.load(file), file, save_as_external_data=True, location="model.onnx.data")
    names = ("model.onnx", "model.onnx.data")
    edit_record(package, files={name: sha256_file(package / name) for name in names})
    model = write_triton(package, tmp_path / "models")
    assert sorted(path.name for path in (model / "1").iterdir()) == sorted(names)
    onnxruntime.InferenceSession(model / "1" / "model.onnx", providers=["CPUExecutionProvider"])


def test_triton__of_a_damaged_package(exported: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(exported[1], tmp_path / "package")
    with (tmp_path / "package" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(PackageError, match=r"model\.onnx"):
        write_triton(tmp_path / "package", tmp_path / "models")


def test_triton__needs_neither_torch_nor_onnx_nor_protobuf(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'torchvision', 'onnx', 'google.protobuf', 'tritonclient'):\n"
        "    sys.modules[name] = None\n"
        "from tldist.export.triton import write_triton\n"
        "write_triton(*sys.argv[1:])\n"
    )
    done = run_python(code, str(exported[1]), str(tmp_path / "models"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "models" / exported[1].name / "config.pbtxt").is_file()
