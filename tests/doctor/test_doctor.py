"""What `tldist doctor` says about machines that are well and machines that are not."""

from __future__ import annotations

import importlib.metadata as metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tldist.doctor import libraries, machine
from tldist.doctor.libraries import EXTRAS
from tldist.doctor.recipe import DoctorRecipe
from tldist.doctor.run import run

TORCH = "torch,torchvision,accelerate"
"""Left out where a test does not need them: they take seconds to import."""
DOCTOR = """
import sys
for name in sys.argv[1].split(","):
    if name:
        sys.modules[name] = None
sys.path[:0] = sys.argv[2].split(",") if sys.argv[2] else []
from tldist.cli import main
sys.exit(main(["doctor", "--json"]))
"""


def examine(
    missing: str = "", first_on_path: Path | None = None, env: dict[str, str] | None = None
) -> tuple[int, dict, str]:
    """Exit code, verdict and error text of `tldist doctor --json` in a new process.

    Args:
        missing: libraries that cannot be imported there.
        first_on_path: a folder that shadows installed packages.
        env: more environment variables.
    """
    answer = subprocess.run(
        [sys.executable, "-c", DOCTOR, missing, str(first_on_path or "")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        timeout=120,
        check=False,
    )
    lines = answer.stdout.splitlines()
    assert lines, answer.stderr
    return answer.returncode, json.loads(lines[-1]), answer.stderr


def fake_distribution(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """What pip would leave behind for a distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text(
        "\n".join([*lines, *(f"Requires-Dist: {need}" for need in requires)]) + "\n"
    )


def words_of(verdict: dict, level: str = "broken") -> str:
    """The findings of one level, as text."""
    return "\n".join(f"{f['what']} | {f['todo']}" for f in verdict["findings"] if f["level"] == level)


def test_doctor__tells_the_truth_about_this_machine() -> None:
    outcome = run(DoctorRecipe())
    facts = outcome.values["machine"]
    assert facts["cores"] == len(os.sched_getaffinity(0))
    assert 0 < facts["free_bytes"] < shutil.disk_usage(Path.cwd()).total
    assert 0 < facts["memory_bytes"] <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("torch", "numpy", "onnx"):
        assert outcome.values["libraries"]["versions"][name] == metadata.version(name)
    assert "CPUExecutionProvider" in outcome.values["runtime"]["providers"]
    assert outcome.values["job"]["ranks"] == 1
    assert outcome.passed is not any(f["level"] == "broken" for f in outcome.values["findings"])


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_doctor__without_a_gpu_claims_no_cuda() -> None:
    # the GPU build lists CUDA as available whatever the machine; only the devices tell
    assert run(DoctorRecipe()).values["runtime"]["providers"] == ["CPUExecutionProvider"]


def test_doctor__works_where_only_the_base_is_installed() -> None:
    code, verdict, error = examine(f"{TORCH},onnxruntime,pyarrow,matplotlib,sklearn,packaging")
    assert (code, error) == (0, "")
    notes = words_of(verdict, "note")
    for extra in ("train", "embed", "report", "demo"):
        assert f"pip install 'tldist[{extra}]'" in notes
    assert verdict["libraries"]["extras"]["train"] is False


def test_doctor__both_builds_of_onnxruntime_are_broken(tmp_path: Path) -> None:
    there = "onnxruntime" if libraries.installed_version("onnxruntime-gpu") else "onnxruntime-gpu"
    fake_distribution(tmp_path, there, "1.0")
    code, verdict, _ = examine(TORCH, first_on_path=tmp_path)
    assert code == 1
    assert verdict["status"] == "failed"
    assert "both onnxruntime and onnxruntime-gpu are installed" in words_of(verdict)
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in words_of(verdict)


def test_doctor__the_half_that_an_uninstall_leaves_behind_is_broken(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime" / "capi").mkdir(parents=True)
    (tmp_path / "onnxruntime" / "__init__.py").touch()
    code, verdict, _ = examine(TORCH, first_on_path=tmp_path)
    assert code == 1
    assert "onnxruntime cannot be used (AttributeError" in words_of(verdict)


def test_doctor__a_torchvision_built_for_another_torch_is_broken(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    code, verdict, _ = examine(first_on_path=tmp_path)
    assert code == 1
    assert "torchvision cannot be imported (RuntimeError: operator torchvision::nms" in words_of(verdict)
    assert "pip install --force-reinstall torch torchvision" in words_of(verdict)


def test_doctor__a_version_below_what_is_needed_is_broken(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "safetensors", "0.1.0")
    code, verdict, _ = examine(TORCH, first_on_path=tmp_path)
    assert code == 1
    assert "safetensors 0.1.0 is installed, but tldist needs safetensors>=" in words_of(verdict)


def test_doctor__a_launcher_that_started_fewer_processes_is_broken() -> None:
    # what `accelerate launch --cpu --num_processes 2` leaves in the environment of its only process
    code, verdict, _ = examine(env={"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"})
    assert code == 1
    assert "asked for several processes and started one" in words_of(verdict)
    assert "accelerate launch --multi_gpu --num_processes 2" in words_of(verdict)


def test_machine__gpu_names_come_from_the_drivers_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'NVIDIA H100\\nNVIDIA A10\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert machine.list_gpus() == ["NVIDIA H100", "NVIDIA A10"]
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'; exit 9\n")
    assert machine.list_gpus() == []


def test_extras__are_those_of_pyproject() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    imports = {"scikit-learn": "sklearn", "onnxruntime-gpu": "onnxruntime"}
    for extra, names in EXTRAS.items():
        needs = {re.split(r"[<>=!~;\[ ]", need)[0] for need in project["optional-dependencies"][extra]}
        assert {imports.get(need, need.replace("-", "_")) for need in needs} - {"tldist"} == set(names)
