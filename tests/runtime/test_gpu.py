"""On a CUDA GPU: the profiles' parity, bound buffers, CUDA graphs, and never the CPU in silence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from tests.support_export import write_bundle_of
from tldist import api
from tldist.errors import MachineError
from tldist.runtime.package import Package
from tldist.runtime.predict import predict
from tldist.runtime.provider import CUDA, TENSORRT
from tldist.runtime.session import CPU, require_provider
from tldist.share import find_shared

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def gpu() -> None:
    """Skip where there is no GPU. With one, a provider that does not work is a failure."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("the ONNX Runtime that is installed is the one for CPUs: pip install 'tldist[gpu]'")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle_of(tmp_path_factory.mktemp("gpu") / "bundle", "squeezenet1_1")


@pytest.fixture(scope="module")
def package(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, for any provider."""
    out = tmp_path_factory.mktemp("gpu") / "package"
    api.export(bundle=str(bundle), out=out, output="both", samples=3)
    return out


def images(count: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return np.stack([np.asarray(Image.fromarray(one).resize((40, 40))) for one in coarse])


def assert_near(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= tolerance * np.abs(values).max(), name


@pytest.mark.parametrize("profile", ["cuda-fp16", "cuda-bf16", "tensorrt-fp16"])
def test_profile__exports_proves_and_runs_on_the_gpu(bundle: Path, tmp_path: Path, profile: str) -> None:
    if not (find_shared("export/profiles") / f"{profile}.yaml").is_file():
        pytest.skip(f"there is no profile {profile}")
    if profile.startswith("tensorrt"):
        try:
            require_provider(TENSORRT)
        except MachineError as error:
            pytest.skip(f"no TensorRT here: {error}")
    outcome = api.export(bundle=str(bundle), out=tmp_path / "package", profile=profile, samples=3)
    assert outcome.values["parity"] == "PASS"
    opened = Package.open(tmp_path / "package")
    assert opened.session.provider == (TENSORRT if profile.startswith("tensorrt") else CUDA)
    assert opened.session.placement is not None
    assert opened.session.placement.count(opened.session.provider) > 0
    assert opened.session.placement.fallen(opened.session.provider) == {}
    assert api.parity(models=(str(tmp_path / "package"),)).passed


def test_session__bound_buffers_give_what_the_cpu_gives(package: Path) -> None:
    on_cpu, on_gpu = Package.open(package, provider=CPU), Package.open(package, provider=CUDA)
    assert on_gpu.session.bindings is not None
    for count in (1, 2, 7, 33, 2, 1):
        pictures = images(count, count)
        assert_near(on_gpu.run(pictures), on_cpu.run(pictures), 1e-2)  # TF32


def test_session__the_model_is_on_the_gpu(package: Path) -> None:
    opened = Package.open(package, provider=CUDA)
    about = opened.describe()
    assert about["provider"] == CUDA
    assert sum(about["placement"][CUDA].values()) > 20
    assert "Conv" not in about["placement"].get(CPU, {})


def test_cuda_graphs__replay_what_a_plain_run_gives(package: Path) -> None:
    plain = Package.open(package, provider=CUDA)
    recorded = Package.open(package, provider=CUDA, cuda_graphs=(1, 4), warm_up=(1, 4))
    for turn, count in enumerate((1, 3, 4, 9, 1, 4, 2)):
        pictures = images(count, turn)  # other pictures each time: a replay reads what is in the buffer now
        assert_near(recorded.run(pictures), plain.run(pictures), 1e-3)


def test_predict__threads_decode_while_the_gpu_runs(package: Path) -> None:
    pictures = list(images(50))
    on_gpu = predict(Package.open(package, provider=CUDA), pictures, 8)
    on_cpu = predict(Package.open(package, provider=CPU), pictures, 8, workers=0)
    assert [one.probability for one in on_gpu] == pytest.approx([one.probability for one in on_cpu], abs=1e-2)


def test_bench__on_the_gpu(package: Path, bundle: Path) -> None:
    outcome = api.bench(
        package=package,
        bundle=str(bundle),
        provider=CUDA,
        cuda_graphs=True,
        batches=(1, 4),
        seconds=0.1,
        variants=("fp16_weights+channels_last", "compile"),
    )
    assert outcome.values["device"] == "cuda"
    assert [row["failed"] for row in outcome.values["rows"]] == [""] * 8
    assert not any(row["wrong"] for row in outcome.values["rows"])
