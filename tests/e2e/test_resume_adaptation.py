"""Killed at any moment and started again, an adaptation ends bitwise as an undisturbed one."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import make_images

IMAGES, TARGET_IMAGES, BATCH, EPOCHS, EVERY = 60, 52, 8, 3, 2
STEPS = -(-IMAGES // BATCH) * EPOCHS

CASES: dict[str, dict[str, Any]] = {
    "cdan": {"probe": 1, "ema": 0.9, "adapt": {"batchnorm": "apart", "hidden": 16}},
    # So fast that the labels made inside an epoch would be others than those made before it.
    "shot": {"adapt": {"weight": 0.5}, "optimizer": {"lr": 0.05}},
}


class Run:
    """The same fine-tuning, started as often as it takes, each time in a process of its own."""

    def __init__(self, data: tuple[Path, Path], out: Path, method: str) -> None:
        more = dict(CASES[method])
        adapt = {"method": method, "target": {"path": str(data[1])}, **more.pop("adapt")}
        self.out, self.checkpoints = out, out / "checkpoints"
        self.settings = {
            "data": {"path": str(data[0])}, "model": "tests.nets:recording_cnn", "weights": "none",
            "out": out, "epochs": EPOCHS, "batch_size": BATCH, "precision": "fp32", "image_size": 32,
            "workers": 0, "checkpoint": {"every_steps": EVERY}, "track": None, "guard": {"duplicates": "off"},
            "adapt": adapt, **more,
        }  # fmt: skip
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["tldist.finetune.run", __name__])

    def start(self) -> Any:
        process = self.context.Process(target=work, args=(self.settings, self.out.with_suffix(".txt")))
        process.start()
        return process

    def finish(self) -> str:
        process = self.start()
        process.join(120)
        text = self.out.with_suffix(".txt").read_text()
        assert process.exitcode == 0, text
        return text

    def saved(self, folder: str = "") -> int:
        found = (self.out / folder / "checkpoints").glob("step-*")
        return max((int(path.name[5:]) for path in found), default=0)


def work(settings: dict[str, Any], words: Path) -> None:
    """One start, in a process that has done the imports and nothing else."""
    from tldist import api

    handle = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    os.environ.update(TLDIST_TEST_TRACE=os.devnull, TLDIST_TEST_STEP_SECONDS="0.01")  # time to be killed
    print(api.finetune(**settings).text, flush=True)


def kill(run: Run, process: Any) -> str:
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    return run.out.with_suffix(".txt").read_text()


def wait_for(condition: Callable[[], bool], process: Any) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < until
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("data")
    make_images(folder / "source" / "train", {"a": 20, "b": 21, "c": IMAGES - 41})
    make_images(folder / "source" / "val", {"a": 3, "b": 3, "c": 3}, seed=1)
    target = make_images(folder / "target", {"a": 17, "b": 17, "c": TARGET_IMAGES - 34}, seed=3)
    return folder / "source", target


@pytest.mark.parametrize("method", CASES)
def test_resume__killed_in_every_part_is_bitwise_the_undisturbed_run(
    data: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    calm, rough = (Run(data, tmp_path / name, method) for name in ("calm", "rough"))
    calm.finish()

    # While source-only learns; while the adapted one does, inside an epoch; inside a save.
    process = rough.start()
    wait_for(lambda: rough.saved("source_only") >= EVERY, process)
    kill(rough, process)
    assert rough.saved() == 0
    process = rough.start()
    wait_for(lambda: rough.saved() >= 2 * EVERY, process)
    time.sleep(0.004)
    kill(rough, process)
    before = rough.saved()
    assert 0 < before < STEPS
    process = rough.start()
    wait_for(lambda: rough.saved() >= before + EVERY, process)
    wait_for(lambda: any((rough.out / "checkpoints").glob(".tmp-*")), process)
    text = kill(rough, process)
    assert f"goes on after step {before}" in text, text
    assert not (rough.out / "choice.json").exists()

    # While the choice is being made.
    process = rough.start()
    wait_for(lambda: (rough.out / "choice.json").exists(), process)
    kill(rough, process)
    text = rough.finish()

    bundles = "bundle", "source_only/bundle"
    last = sorted(path.name for path in calm.checkpoints.glob("step-*"))[-1]
    for folder in (*bundles, f"checkpoints/{last}"):
        files = [path.name for path in (calm.out / folder).glob("*.safetensors")]
        assert files
        if method == "cdan" and folder.startswith("checkpoints"):
            assert "auxiliary.safetensors" in files, "the opponent is saved"
        for name in files:
            first, second = (load_file(run.out / folder / name) for run in (calm, rough))
            assert first.keys() == second.keys()
            for key in first:
                assert first[key].numpy().tobytes() == second[key].numpy().tobytes(), (
                    f"{folder}/{name}: {key}"
                )
    names = {name for folder in bundles for name in load_file(calm.out / folder / "model.safetensors")}
    assert not [name for name in names if "auxiliary" in name], "and is no part of the bundle"
    choices = [json.loads((run.out / "choice.json").read_text()) for run in (calm, rough)]
    assert choices[0] == choices[1]
    losses = [
        [(line["step"], line.get("loss"), line.get("transfer_loss")) for line in read_metrics(run.out)]
        for run in (calm, rough)
    ]
    assert losses[0][-1] == losses[1][-1]
    assert "is finished already" in rough.finish()


def read_metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
