"""Killed or told to stop and started again, a distillation ends with bitwise the undisturbed weights."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fuse.distill.driver import main
from tests.fuse.distill.pupils import unlabelled
from tests.support import make_images
from tests.support_models import make_bundle

EVERY, IMAGES, BATCH, EPOCHS = 3, 36, 8, 4
STEPS = -(-IMAGES // BATCH) * EPOCHS


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, and images with labels and without."""
    root = tmp_path_factory.mktemp("resume")
    make_bundle(root / "first", ("a", "b"), name="tests.nets:recording_cnn")
    make_bundle(root / "second", ("c", "b"), name="tests.nets:slow_cnn", seed=1)
    make_images(root / "labelled" / "train", {"a": 12, "b": 12, "c": 12})
    make_images(root / "labelled" / "val", {"a": 3, "b": 3, "c": 3}, seed=1)
    unlabelled(root / "unlabelled" / "train", "abc", 12)
    unlabelled(root / "unlabelled" / "val", "abc", 3, seed=1)
    return root


class Run:
    """The same run, started as often as it takes, in processes of its own."""

    def __init__(self, root: Path, data: str, out: Path, *settings: str) -> None:
        self.out, self.log = out, out.with_suffix(".log")
        self.arguments = [
            str(root / "first"), str(root / "second"),
            f"data={root / data}", f"out={out}", "distill=tests.nets:recording_cnn", "distill.weights=none",
            "distill.image_size=32", "distill.precision=fp32", f"distill.epochs={EPOCHS}",
            f"distill.batch_size={BATCH}", f"distill.checkpoint.every_steps={EVERY}", "workers=0",
            "distill.features=0.5", *settings,
        ]  # fmt: skip

    def start(self, **environment: str) -> Any:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.fuse.distill.driver", __name__])
        process = context.Process(target=_work, args=(self.arguments, self.log, environment))
        process.start()
        return process

    def start_slow(self) -> Any:
        """Slow in each step, so that a signal lands among them."""
        trace = str(self.out.with_suffix(".trace"))
        return self.start(TLDIST_TEST_TRACE=trace, TLDIST_TEST_STEP_SECONDS="0.05")

    def finish(self) -> None:
        process = self.start()
        process.join(120)
        assert process.exitcode == 0, self.log.read_text()

    def steps_saved(self) -> int:
        found = (self.out / "checkpoints").glob("step-*")
        return max((int(path.name[5:]) for path in found), default=0)

    def weights(self) -> dict[str, bytes]:
        tensors = load_file(self.out / "bundle" / "model.safetensors")
        return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}

    def wait_for(self, condition: Callable[[], bool], process: Any) -> None:
        until = time.monotonic() + 90
        while not condition():
            assert process.exitcode is None, self.log.read_text()
            assert time.monotonic() < until
            time.sleep(0.001)


def _work(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """What the command does, in a process group of its own."""
    os.setsid()
    os.environ.update(environment)
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(arguments))


def kill(process: Any) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.join(60)


@pytest.mark.parametrize(
    ("data", "settings"),
    [("unlabelled", ()), ("labelled", ("distill.augment=false", "distill.gradient_accumulation=2"))],
)
def test_resume__killed_and_told_to_stop_is_bitwise_the_undisturbed_run(
    root: Path, tmp_path: Path, data: str, settings: tuple[str, ...]
) -> None:
    calm, rough = (Run(root, data, tmp_path / name, *settings) for name in ("calm", "rough"))
    calm.finish()

    process = rough.start_slow()
    rough.wait_for(lambda: rough.steps_saved() >= 2 * EVERY, process)
    kill(process)
    saved = rough.steps_saved()
    assert 0 < saved < STEPS

    process = rough.start_slow()
    rough.wait_for(lambda: rough.steps_saved() > saved, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    text = rough.log.read_text()
    assert process.exitcode == 75, text
    assert f"goes on after step {saved}" in text
    assert json.loads((rough.out / "summary.json").read_text())["status"] == "preempted"
    assert rough.steps_saved() < STEPS

    rough.finish()
    assert rough.weights() == calm.weights()
    rough.finish()  # nothing is left to do: chosen and measured again
    assert rough.weights() == calm.weights()


def test_resume__killed_while_the_teachers_speak(root: Path, tmp_path: Path) -> None:
    settings = ("distill.augment=false",)
    calm, rough = (Run(root, "unlabelled", tmp_path / name, *settings) for name in ("calm", "rough"))
    calm.finish()
    marker = tmp_path / "marker"
    process = rough.start(TLDIST_TEST_MARKER=str(marker))
    rough.wait_for(lambda: any((rough.out / "work").glob(".tmp-*")) and marker.exists(), process)
    kill(process)
    half_made = set((rough.out / "work").glob(".tmp-*"))
    assert half_made
    assert not any((rough.out / "work").glob("[!.]*/meta.json")), "no file says that it is complete"
    rough.finish()
    assert not any(path.exists() for path in half_made)
    assert rough.weights() == calm.weights()
