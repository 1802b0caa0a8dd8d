"""One session: settings that are applied, buffers that are bound, nodes that are where they should be."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from tests.embed.tiny import SIZE, tiny_package
from tldist.errors import MachineError
from tldist.export.profile import Profile
from tldist.runtime.binding import MOST_SHAPES, Bindings
from tldist.runtime.package import Package, open_graph, read_package
from tldist.runtime.placement import Placement, assigned, profiled
from tldist.runtime.provider import Settings
from tldist.runtime.session import INPUT, Session, _check_placement, open_session

WEIGHTS = np.random.default_rng(5).normal(size=(3, 6)).astype(np.float32)
OUTPUTS: dict[str, tuple[int, type[np.generic]]] = {"features": (6, np.float32)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_package(tmp_path_factory.mktemp("session") / "tiny", WEIGHTS)


@pytest.fixture(scope="module")
def session(tiny: Path) -> Session:
    return open_session(tiny / "model.onnx", threads=1)


def images(count: int, seed: int = 0, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def by_hand(pictures: np.ndarray) -> np.ndarray:
    return (pictures.astype(np.float64).mean((1, 2)) @ WEIGHTS).astype(np.float32)


# -- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["all", "extended", "basic", "none"])
def test_settings__are_those_of_the_session(tiny: Path, level: str) -> None:
    how = Settings(threads=3, spinning=False, optimization=level)  # type: ignore[arg-type]
    session = open_session(tiny / "model.onnx", settings=how)
    options = session.raw.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    names = {
        "all": "ENABLE_ALL",
        "extended": "ENABLE_EXTENDED",
        "basic": "ENABLE_BASIC",
        "none": "DISABLE_ALL",
    }
    assert str(options.graph_optimization_level).endswith(f"ORT_{names[level]}")
    recorded = json.loads(json.dumps(session.describe()))
    assert (recorded["threads"], recorded["spinning"], recorded["optimization"]) == (3, False, level)
    assert recorded["onnxruntime"] == onnxruntime.__version__
    if hasattr(session.raw, "get_provider_graph_assignment_info"):
        assert recorded["placement"] == {"CPUExecutionProvider": {"Cast": 1, "ReduceMean": 1, "MatMul": 1}}


def test_settings__what_makes_no_sense_is_refused(tiny: Path) -> None:
    with pytest.raises(MachineError, match="CUDAExecutionProvider alone"):
        Package.open(tiny, cuda_graphs=(1, 8))
    with pytest.raises(MachineError, match="Did you mean: extended"):
        Package.open(tiny, optimization="extend")  # type: ignore[arg-type]


def test_open__a_gpu_that_is_not_there_is_said(tiny: Path) -> None:
    if any(device.ep_name == "CUDAExecutionProvider" for device in onnxruntime.get_ep_devices()):
        pytest.skip("there is one")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("the ONNX Runtime for CPUs knows no CUDA")
    for provider in ("CUDAExecutionProvider", "TensorrtExecutionProvider"):
        with pytest.raises(MachineError, match=f"'{provider}'"):
            Package.open(tiny, provider=provider)


def test_open__a_provider_that_takes_nothing_is_no_silent_cpu(tiny: Path) -> None:
    """The build for CPUs has a provider for remote models: it accepts a session and runs nothing."""
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has no such provider")
    with pytest.raises(MachineError, match=r"leaves 2 nodes to the CPU: 1 ReduceMean, 1 MatMul"):
        Package.open(tiny, provider="AzureExecutionProvider")
    Package.open(tiny, provider="AzureExecutionProvider", max_cpu_nodes=2)


def test_open__the_profile_says_how_many_nodes_may_fall_to_the_cpu(tiny: Path) -> None:
    config = read_package(tiny)
    assert open_graph(tiny, config).settings.max_cpu_nodes == 0
    allowing = replace(config, profile=config.profile | {"max_cpu_nodes": 7})
    assert open_graph(tiny, allowing).settings.max_cpu_nodes == 7
    assert (
        Profile.make(name="p", tolerances=config.profile["tolerances"], max_cpu_nodes="7").max_cpu_nodes == 7
    )


def test_warm_up__runs_the_sizes(tiny: Path) -> None:
    package = Package.open(tiny, warm_up=(1, 3))
    seconds = package.warm_up((2, 5))
    assert list(seconds) == [2, 5]
    assert all(0 < value < 60 for value in seconds.values())
    about = json.loads(json.dumps(package.describe()))
    assert about["package"] == package.config.identity
    assert about["provider"] == "CPUExecutionProvider"


# -- placement ------------------------------------------------------------------------------------------


def test_placement__an_old_runtimes_profile_says_the_same(tiny: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(tmp_path / "profile")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    raw = onnxruntime.InferenceSession(tiny / "model.onnx", options, providers=["CPUExecutionProvider"])
    for count in (1, 2):  # a node is counted once, however often it runs
        raw.run(None, {INPUT: images(count)})
    found = profiled(Path(raw.end_profiling()))
    assert found == Placement({"CPUExecutionProvider": {"Cast": 1, "ReduceMean": 1, "MatMul": 1}})
    remembered = assigned(raw)
    assert remembered is None or remembered == found


def test_placement__work_on_the_cpu_is_no_silent_matter() -> None:
    gpu, cpu = "CUDAExecutionProvider", "CPUExecutionProvider"
    mixed = Placement.of([(gpu, "Conv")] * 9 + [(cpu, "Shape"), (cpu, "Gather"), (cpu, "Gather")])
    _check_placement(mixed, gpu, 0)
    assert mixed.count(cpu) == 3
    assert mixed.to_text() == f"{gpu} 9 nodes; {cpu} 3 nodes (2 Gather, 1 Shape)"
    broken = Placement.of([(gpu, "Conv"), (cpu, "Shape"), (cpu, "LayerNormalization"), (cpu, "Conv")])
    with pytest.raises(MachineError, match=r"leaves 2 nodes to the CPU: 1 LayerNormalization, 1 Conv"):
        _check_placement(broken, gpu, 1)
    _check_placement(broken, gpu, 2)
    _check_placement(broken, cpu, 0)
    _check_placement(None, cpu, 0)


# -- bound buffers --------------------------------------------------------------------------------------


def bindings(session: Session, **options: object) -> Bindings:
    return Bindings(onnxruntime, session.raw, ("cpu", 0), INPUT, OUTPUTS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("batches", [(), (4,), (8, 2)])
def test_bindings__every_batch_gives_what_a_plain_run_gives(
    session: Session, batches: tuple[int, ...], graphs: bool
) -> None:
    bound = bindings(session, batches=batches, graphs=graphs)
    for count in (1, 2, 3, 4, 5, 8, 9, 17, 2, 1):
        pictures = images(count, seed=count)
        found = bound.run(pictures)["features"]
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, by_hand(pictures), rtol=1e-5, atol=1e-4)


def test_bindings__buffers_are_used_again_and_answers_are_copies(session: Session) -> None:
    bound = bindings(session)
    first = bound.run(images(3, 1))["features"]
    kept = first.copy()
    place = bound._bound((3, SIZE, SIZE, 3)).images.data_ptr()
    second = bound.run(images(3, 2))["features"]
    assert bound._bound((3, SIZE, SIZE, 3)).images.data_ptr() == place
    np.testing.assert_array_equal(first, kept)
    assert np.abs(second - first).max() > 1e-3


def test_bindings__as_many_shapes_as_are_kept(session: Session) -> None:
    plain, recording = bindings(session), bindings(session, graphs=True)
    for count in range(1, MOST_SHAPES + 4):
        for bound in (plain, recording):
            pictures = images(count, count)
            np.testing.assert_allclose(
                bound.run(pictures)["features"], by_hand(pictures), rtol=1e-5, atol=1e-4
            )
    assert len(plain._kept) == len(recording._kept) == MOST_SHAPES
    assert next(iter(plain._kept))[0] == 4, "the oldest have gone"
    ids = [bound.options.get_run_config_entry("gpu_graph_id") for bound in recording._kept.values()]
    assert ids == [str(number) for number in range(1, MOST_SHAPES + 1)], "no two shapes share a graph"
    beyond = recording._bound((99, SIZE, SIZE, 3))
    assert beyond.options.get_run_config_entry("gpu_graph_id") == "-1"


def test_bindings__threads_do_not_mix_their_answers(tmp_path: Path) -> None:
    whole = tiny_package(tmp_path / "whole", WEIGHTS, kind="picture")
    bound = bindings(open_session(whole / "model.onnx", threads=1))
    wrong: list[int] = []

    def work(seed: int) -> None:
        pictures = images(4, seed, 200)  # large, so that threads meet while the graph runs
        expected = by_hand(pictures)
        for _ in range(15):
            if np.abs(bound.run(pictures)["features"] - expected).max() > 1e-2:
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_session__runs_through_its_bindings(session: Session) -> None:
    """The way that a GPU's session goes."""
    bound = replace(session, bindings=bindings(session, batches=(4,)))
    pictures = images(6)
    np.testing.assert_allclose(bound.run(pictures)["features"], by_hand(pictures), rtol=1e-5, atol=1e-4)
    assert bound.run(pictures[:0])["features"].shape == (0, 6)
    strided = pictures[:, ::-1]
    np.testing.assert_allclose(bound.run(strided)["features"], by_hand(strided), rtol=1e-5, atol=1e-4)
