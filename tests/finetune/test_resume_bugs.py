"""The resume bugs that users of other toolkits have reported, one test each; none may exist here.

Runs are made in this process and cut off after a step by taking away what came later, as a kill would have
left it. Kills of real processes are in tests/e2e.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.support_processes import run_ranks
from tldist import api
from tldist.errors import RecipeError
from tldist.training.saver import Saver

IMAGES, BATCH, EPOCHS = 30, 8, 4
PER_EPOCH = 4
SETTINGS: dict[str, Any] = {
    "model": "tests.nets:recording_cnn", "weights": "none", "image_size": 32, "precision": "fp32",
    "batch_size": BATCH, "epochs": EPOCHS, "workers": 0, "calibrate": False, "track": None,
    "checkpoint": {"every_steps": 1, "keep": 99}, "guard": {"duplicates": "off"},
    "augment": {"crop": None, "flip": False}, "optimizer": {"lr": 0.01, "warmup": 0.2},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose number stands in their blue channel."""
    folder = tmp_path_factory.mktemp("data") / "d"
    random = np.random.default_rng(0)
    for number in range(IMAGES + 9):
        picture = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        picture[:, :, 2] = number
        target = folder / ("train" if number < IMAGES else "val") / "abc"[number % 3]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(target / f"{number}.png")
    return folder


def finetune(data: Path, out: Path, settings: dict[str, Any]) -> None:
    api.finetune(data=str(data), out=out, **{**SETTINGS, **settings})


def cut_off(out: Path, step: int) -> None:
    """What a kill after a step would have left."""
    for path in (out / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "bundle", ignore_errors=True)
    (out / "summary.json").unlink(missing_ok=True)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle/model.safetensors")


def lines(out: Path, key: str) -> list[tuple[int, Any]]:
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row[key]) for row in rows if key in row]


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = weights(first), weights(second)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for key in ("loss", "lr", "samples", "epoch", "val_loss"):
        assert lines(first, key) == lines(second, key), key


@pytest.fixture(scope="module")
def calm(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An undisturbed run with some settings, made once."""
    folder, made = tmp_path_factory.mktemp("calm"), dict[str, Path]()

    def get(**settings: Any) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in made:
            made[key] = folder / str(len(made))
            finetune(data, made[key], settings)
        return made[key]

    return get


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle"])
def test_the_schedule_goes_on_where_it_was(
    data: Path, tmp_path: Path, calm: Callable[..., Path], schedule: str
) -> None:
    """LightlyTrain: the learning rate's schedule was wrong after a resume."""
    settings = {"optimizer": {"lr": 0.01, "warmup": 0.3, "schedule": schedule}}
    shutil.copytree(calm(**settings), tmp_path / "r")
    cut_off(tmp_path / "r", 3)  # inside the warm-up
    finetune(data, tmp_path / "r", settings)
    assert_same(tmp_path / "r", calm(**settings))


def test_the_average_of_the_weights_is_not_lost(
    data: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    """LightlyTrain: the EMA weights were lost on resume."""
    shutil.copytree(calm(ema=0.9), tmp_path / "r")
    cut_off(tmp_path / "r", 9)
    finetune(data, tmp_path / "r", {"ema": 0.9})
    assert_same(tmp_path / "r", calm(ema=0.9))
    assert any(not torch.equal(weights(calm())[n], t) for n, t in weights(calm(ema=0.9)).items())


def test_epochs_may_grow(data: Path, tmp_path: Path, calm: Callable[..., Path]) -> None:
    """LightlyTrain: no parameter may change on resume. Here epochs may grow; the schedule is then the longer
    one from where the run stands."""
    constant = {"optimizer": {"lr": 0.01, "warmup": 0.0, "schedule": "constant"}, "select": "last"}
    finetune(data, tmp_path / "r", {**constant, "epochs": 2})
    finetune(data, tmp_path / "r", {**constant, "epochs": EPOCHS})
    assert_same(tmp_path / "r", calm(**constant))
    with pytest.raises(RecipeError, match="it may grow, not shrink"):
        finetune(data, tmp_path / "r", {**constant, "epochs": 1})


@pytest.mark.parametrize("step", [5, 2 * PER_EPOCH])
def test_the_order_of_the_data_goes_on_and_the_next_epochs_are_new_ones(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Accelerate: other data, or the order of an epoch before, after a resume; skip_first_batches forgets
    drop_last. torchtune: an epoch too many."""
    monkeypatch.setenv("TLDIST_TEST_TRACE", str(tmp_path / "calm.trace"))
    finetune(data, tmp_path / "calm", {})
    monkeypatch.setenv("TLDIST_TEST_TRACE", str(tmp_path / "rough.trace"))
    finetune(data, tmp_path / "rough", {})
    cut_off(tmp_path / "rough", step)
    (tmp_path / "rough.trace").unlink()
    finetune(data, tmp_path / "rough", {})
    undisturbed = (tmp_path / "calm.trace").read_text().splitlines()
    assert (tmp_path / "rough.trace").read_text().splitlines() == undisturbed[step:]
    epochs = [" ".join(undisturbed[e * PER_EPOCH : (e + 1) * PER_EPOCH]).split() for e in range(EPOCHS)]
    assert all(Counter(epoch) == {str(number): 1 for number in range(IMAGES)} for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == EPOCHS


def test_the_second_resume_is_as_good_as_the_first(
    data: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    """torchtitan: the loader started again on the second resume."""
    shutil.copytree(calm(), tmp_path / "r")
    for step in (2, 7, 11, 13):
        cut_off(tmp_path / "r", step)
        finetune(data, tmp_path / "r", {})
    assert_same(tmp_path / "r", calm())


def test_randomness_of_every_process_goes_on(data: Path, tmp_path: Path) -> None:
    """Accelerate: random states of some ranks were missing, or saved and restored unlike. Dropout, mixing and
    augmentation on two processes."""
    settings = {"augment": {"mixup": 0.4, "policy": "trivialaugment"}}
    run_ranks(finetune, 2, data, tmp_path / "calm", settings)
    shutil.copytree(tmp_path / "calm", tmp_path / "r")
    cut_off(tmp_path / "r", 6)
    run_ranks(finetune, 2, data, tmp_path / "r", settings)
    assert_same(tmp_path / "r", tmp_path / "calm")


def test_the_rate_does_not_depend_on_the_number_of_processes(
    data: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    """Accelerate: the scheduler stepped once a process; another number of processes was not supported."""
    settings = {"model": "tests.nets:plain_cnn"}
    shutil.copytree(calm(**settings), tmp_path / "r")
    cut_off(tmp_path / "r", 6)
    run_ranks(finetune, 3, data, tmp_path / "r", settings)
    for key in ("lr", "samples", "epoch"):
        assert lines(tmp_path / "r", key) == lines(calm(**settings), key)
    ours, theirs = weights(tmp_path / "r"), weights(calm(**settings))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_formats_of_numbers_survive(data: Path, tmp_path: Path, calm: Callable[..., Path]) -> None:
    """torchtitan: buffers were cast down, and the result had another type than asked for."""
    settings = {"precision": "bf16"}
    shutil.copytree(calm(**settings), tmp_path / "r")
    cut_off(tmp_path / "r", 6)
    finetune(data, tmp_path / "r", settings)
    ours, theirs = weights(tmp_path / "r"), weights(calm(**settings))
    assert {n: t.dtype for n, t in ours.items()} == {n: t.dtype for n, t in theirs.items()}
    assert {t.dtype for n, t in ours.items() if "num_batches" not in n} == {torch.float32}
    assert ours["2.num_batches_tracked"].dtype == torch.int64
    assert_same(tmp_path / "r", calm(**settings))


def test_the_newest_checkpoint_is_the_one_that_is_used(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Accelerate's complete_cv_example: its branch for the most recent checkpoint is never reached; and names
    sort as text (step-9 after step-10)."""
    finetune(data, tmp_path / "r", {})
    cut_off(tmp_path / "r", 10)
    finetune(data, tmp_path / "r", {})
    assert "goes on after step 10 " in capsys.readouterr().out


def test_steps_are_saved_all_along(data: Path, tmp_path: Path) -> None:
    """torchtune: step checkpoints only came at the end of its life; timm: none inside an epoch."""
    finetune(data, tmp_path / "r", {"checkpoint": {"every_steps": 3, "keep": 99}})
    saved = {int(path.name[5:]) for path in (tmp_path / "r/checkpoints").iterdir()}
    assert saved == {3, 6, 9, 12, 15} | {4, 8, 12, 16}


def test_a_save_that_is_slow_to_copy_is_not_torn(
    data: Path, tmp_path: Path, calm: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any that saves beside the training: weights of one step, optimiser state of the next."""
    write = Saver._write

    def slow(self: Saver, *arguments: Any) -> None:
        time.sleep(0.05)
        write(self, *arguments)

    monkeypatch.setattr(Saver, "_write", slow)
    finetune(data, tmp_path / "r", {})
    cut_off(tmp_path / "r", 6)
    finetune(data, tmp_path / "r", {})
    assert_same(tmp_path / "r", calm())
