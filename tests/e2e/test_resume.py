"""Killed at any moment and started again, a run ends with bitwise the weights of an undisturbed one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.support import REPOSITORY

IMAGES, BATCH, EPOCHS = 90, 8, 4
STEPS = -(-IMAGES // BATCH) * EPOCHS
EVERY = 3


def domain(folder: Path) -> Path:
    """Images with structure in red and green, and their number in a constant blue."""
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        picture = random.integers(0, 255, (48, 48, 3), dtype=np.uint8)
        picture[:, (number % 3) * 16 : (number % 3) * 16 + 16, 0] = 255
        picture[:, :, 2] = number
        target = folder / "train" / "abc"[number % 3]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(target / f"{number}.png")
    for name in "abc":
        (folder / "val" / name).mkdir(parents=True)
        Image.fromarray(random.integers(0, 255, (48, 48, 3), dtype=np.uint8)).save(
            folder / "val" / name / "0.png"
        )
    return folder


class Run:
    """The same command, started as often as it takes."""

    def __init__(self, data: Path, out: Path, *settings: str) -> None:
        self.data, self.out, self.trace = data, out, out.with_suffix(".trace")
        self.command = [
            sys.executable, "-m", "tldist", "finetune", f"data={data}", "model=tests.nets:recording_cnn",
            "weights=none", f"out={out}", f"epochs={EPOCHS}", f"batch_size={BATCH}", "precision=fp32",
            "image_size=40", "workers=2", f"checkpoint.every_steps={EVERY}", "augment.brightness=0",
            *settings,
        ]  # fmt: skip

    def start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TLDIST_TEST_TRACE": str(self.trace)}
        return subprocess.Popen(
            self.command, cwd=REPOSITORY, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def finish(self) -> str:
        process = self.start()
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
        return text

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


def kill(process: subprocess.Popen[str]) -> str:
    os.killpg(process.pid, signal.SIGKILL)
    text, _ = process.communicate(timeout=60)
    return text


def wait_for(condition, process: subprocess.Popen[str]) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.0005)


def steps_saved(run: Run) -> int:
    return max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An undisturbed run; its data lies beside it."""
    folder = tmp_path_factory.mktemp("calm")
    undisturbed = Run(domain(folder / "data"), folder / "calm")
    undisturbed.finish()
    return undisturbed


def test_resume__killed_twice_is_bitwise_the_undisturbed_run(calm: Run, tmp_path: Path) -> None:
    rough = Run(calm.data, tmp_path / "rough")
    effective: list[str] = []

    # Between the first and the last checkpoint, inside a step.
    process = rough.start()
    wait_for(lambda: steps_saved(rough) >= 4 * EVERY, process)
    time.sleep(0.004)
    kill(process)
    assert 0 < steps_saved(rough) < STEPS

    # Inside a save: the temporary folder of a checkpoint is there and was never renamed.
    effective = _counted(rough, effective, steps_saved(rough))
    before = steps_saved(rough)
    process = rough.start()
    wait_for(lambda: steps_saved(rough) >= before + EVERY, process)
    wait_for(lambda: any(rough.checkpoints.glob(".tmp-*")), process)
    text = kill(process)
    assert re.search(rf"goes on after step {before}\b", text), text
    assert steps_saved(rough) < STEPS
    assert any(rough.checkpoints.glob(".tmp-*")), "the kill landed inside a save"

    effective = _counted(rough, effective, steps_saved(rough))
    resumed = steps_saved(rough)
    text = rough.finish()
    assert re.search(rf"goes on after step {resumed}\b", text), text
    effective = _counted(rough, effective, STEPS)

    undisturbed = calm.trace.read_text().splitlines()
    assert effective == undisturbed
    per_epoch = STEPS // EPOCHS
    for epoch in range(EPOCHS):
        lines = effective[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert Counter(" ".join(lines).split()) == {str(number): 1 for number in range(IMAGES)}
    _assert_bitwise(calm.out, rough.out)

    # And once more: a finished run says so and changes nothing.
    assert "is finished already" in rough.finish()
    _assert_bitwise(calm.out, rough.out)


def _counted(run: Run, before: list[str], steps: int) -> list[str]:
    """The steps that count so far: those before, then this attempt's, up to the newest checkpoint."""
    lines = run.trace.read_text().splitlines()
    run.trace.unlink()
    return (before + lines)[:steps]


def _assert_bitwise(calm: Path, rough: Path) -> None:
    first, second = (load_file(out / "bundle" / "model.safetensors") for out in (calm, rough))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].numpy().tobytes() == second[name].numpy().tobytes(), name


def test_resume__damaged_newest_checkpoint_is_passed_over(calm: Run, tmp_path: Path) -> None:
    rough = Run(calm.data, tmp_path / "rough", "checkpoint.keep=3")
    process = rough.start()
    wait_for(lambda: steps_saved(rough) >= 4 * EVERY, process)
    kill(process)
    newest = max(rough.checkpoints.glob("step-*"))
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 0xFF
    file.write_bytes(content)
    text = rough.finish()
    assert f"the checkpoint {newest.name} is not used" in text
    _assert_bitwise(calm.out, rough.out)


EVERYTHING = [
    "train=last:1",
    "unfreeze=2:all",
    "probe=1",
    "ema=0.9",
    "augment.mixup=0.4",
    "augment.policy=trivialaugment",
    "optimizer.l2_sp=0.01",
    "optimizer.layer_decay=0.8",
    "class_weights=balanced",
    "gradient_accumulation=2",
]


def test_resume__with_phases_averages_and_mixing_is_bitwise(calm: Run, tmp_path: Path) -> None:
    whole, rough = (
        Run(calm.data, tmp_path / "whole", *EVERYTHING),
        Run(calm.data, tmp_path / "rough", *EVERYTHING),
    )
    whole.finish()
    for goal in (2 * EVERY, STEPS - EVERY):  # in the first phases, and in the last
        process = rough.start()
        wait_for(lambda goal=goal: steps_saved(rough) >= goal, process)
        kill(process)
        assert steps_saved(rough) < STEPS + STEPS // EPOCHS
    rough.finish()
    _assert_bitwise(whole.out, rough.out)


def test_sigterm__saves_and_exits_with_75_and_goes_on(calm: Run, tmp_path: Path) -> None:
    rough = Run(calm.data, tmp_path / "rough")
    process = rough.start()
    wait_for(lambda: steps_saved(rough) >= EVERY, process)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 75, text
    assert '"status": "preempted"' in (rough.out / "summary.json").read_text()
    rough.finish()
    _assert_bitwise(calm.out, rough.out)
