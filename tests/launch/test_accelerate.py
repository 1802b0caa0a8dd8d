"""The Accelerate configurations that people copy: read by Accelerate's own parser, run where a CPU can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.numpy import load_file

from tests.support import REPOSITORY, make_images, run_tldist
from tests.support_models import make_bundle
from tldist.share import find_shared

FOLDER = REPOSITORY / "launch" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))


def launch(*arguments: str, timeout_seconds: int = 180) -> subprocess.CompletedProcess[str]:
    """Run ``accelerate launch``, as a person would who has no configuration of their own."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("ACCELERATE_")
        and name not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    }
    return subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**clean, "OMP_NUM_THREADS": "1", "HF_HOME": "/nonexistent"},
        timeout=timeout_seconds,
        check=False,
    )


def test_files__are_there() -> None:
    assert {file.stem for file in FILES} >= {"cpu-2", "gpu-1", "gpu-multi", "gpu-fsdp"}
    assert find_shared("launch/accelerate/cpu-2.yaml").is_file()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file__accelerates_own_parser_reads_it(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision in ("no", "fp16", "bf16"), "a bare no is false in YAML"
    assert config.num_processes >= 1


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file__every_line_is_explained(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    assert f"--config_file launch/accelerate/{file.name}" in "\n".join(lines), "how to start it"
    for before, line in zip(["", *lines], lines):
        assert not line or line.startswith("#") or " # " in line or before.startswith("#"), line


@pytest.mark.parametrize(("name", "processes"), [("cpu-2", 2), ("gpu-multi", 8), ("gpu-fsdp", 8)])
def test_file__the_launcher_will_start_all_processes(name: str, processes: int) -> None:
    arguments = ["--config_file", str(FOLDER / f"{name}.yaml"), "-m", "tldist", "doctor"]
    args = launch_command_parser().parse_args(arguments)
    args, _, _ = _validate_launch_command(args)
    assert args.multi_gpu or args.use_fsdp, "anything else starts one process, whatever num_processes says"
    environment = prepare_multi_gpu_env(args)
    assert args.nproc_per_node == str(processes)
    if args.use_fsdp:
        assert environment["ACCELERATE_USE_FSDP"] == "true"
        assert environment["FSDP_VERSION"] == "2"
    assert (
        environment["ACCELERATE_MIXED_PRECISION"]
        == load_config_from_file(str(FOLDER / f"{name}.yaml")).mixed_precision
    )


@pytest.mark.launcher
def test_cpu_2__two_processes_fuse_files_and_bundles(tmp_path: Path) -> None:
    """Without torch's help and with data: what one process makes."""
    models = [make_bundle(tmp_path / f"m{n}", ("a", "b"), name="squeezenet1_1", seed=0) for n in range(2)]
    data = make_images(tmp_path / "data", {"a": 5, "b": 4})
    for name, settings in (("raw", ["raw=true", "method=multi_slerp"]), ("fisher", ["method=fisher"])):
        if name == "fisher":
            settings += [f"data={data}", "workers=0", "samples=8"]
        command = ["-m", "tldist", "fuse", *map(str, models), *settings, "--json"]
        two = launch("--config_file", str(FOLDER / "cpu-2.yaml"), *command, f"out={tmp_path / name}2")
        assert two.returncode == 0, two.stderr
        assert json.loads(two.stdout.splitlines()[-1])["status"] == "done"
        one = run_tldist(*command[2:], f"out={tmp_path / name}1")
        assert one.returncode == 0, one.stderr
        result = "weights" if name == "raw" else "bundle"
        first, second = (load_file(tmp_path / f"{name}{n}" / result / "model.safetensors") for n in (1, 2))
        for key, tensor in first.items():
            np.testing.assert_allclose(second[key], tensor, rtol=1e-5, atol=1e-6, err_msg=key)


@pytest.mark.launcher
def test_cpu_2__gives_two_ranks_that_know_each_other() -> None:
    answer = launch("--config_file", str(FOLDER / "cpu-2.yaml"), "-m", "tldist", "doctor", "--json")
    assert answer.returncode == 0, answer.stderr
    verdicts = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    assert len(verdicts) == 1, "only the main process speaks"
    assert verdicts[0]["job"]["ranks"] == 2
    assert len(verdicts[0]["job"]["hosts"]) == 1


@pytest.mark.launcher
def test_cpu_flag__is_refused_with_the_command_that_works(tmp_path: Path) -> None:
    wrong = ("--cpu", "--num_processes", "2", "--num_machines", "1", "-m", "tldist")
    settings = [f"data={tmp_path}", "model=resnet18", "weights=none", f"out={tmp_path / 'run'}"]
    answer = launch(*wrong, "finetune", *settings)
    assert answer.returncode == 1, "the launcher turns a worker's 2 into 1"
    message = next(line for line in answer.stderr.splitlines() if line.startswith("error: "))
    assert "asked for several processes and started one" in message
    assert "accelerate launch --multi_gpu --num_processes 2" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.launcher
def test_multi_cpu_file__is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "looks-right.yaml"
    file.write_text("distributed_type: MULTI_CPU\nuse_cpu: true\nnum_processes: 2\nmixed_precision: 'no'\n")
    answer = launch("--config_file", str(file), "-m", "tldist", "doctor")
    assert answer.returncode == 1
    assert "broken: accelerate launch was asked for several processes and started one" in answer.stdout
