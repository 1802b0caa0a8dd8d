"""Checkpoints written beside the training hold the state of the moment they were asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from tldist.distributed import Team
from tldist.training.checkpoint import MODEL, OPTIMIZER, Position, list_checkpoints, newest_checkpoint
from tldist.training.optim import build_optimizer, load_optimizer_tensors
from tldist.training.saver import Saver

ALONE = Team(0, 1, 1, torch.device("cpu"))


def stepped(seed: int, name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    optimizer = build_optimizer(model, name=name, lr=0.1, weight_decay=0.1, momentum=0.9)
    step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(7, 6)).square().mean().backward()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    optimizer.zero_grad()


def test_saver__writes_what_was_there_though_training_goes_on(tmp_path: Path) -> None:
    model, optimizer = stepped(0, "adamw")
    saver, position = Saver(tmp_path, keep=5, frozen=(), team=ALONE), Position(step=1, samples=7)
    at_save = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saver.save(model, optimizer, None, position)
    saver.settle()
    step(model, optimizer)
    position.step = 2
    saver.wait()
    (saved,) = list_checkpoints(tmp_path)
    assert saved.step == 1
    assert saved.position() == Position(step=1, samples=7)
    stored = saved.tensors(MODEL)
    assert all(torch.equal(stored[name], at_save[name]) for name in at_save)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_saver__going_on_from_it_is_bitwise(tmp_path: Path, name: str) -> None:
    model, optimizer = stepped(1, name)
    saver = Saver(tmp_path, keep=2, frozen=(), team=ALONE)
    saver.save(model, optimizer, None, Position(step=1))
    saver.wait()
    other, other_optimizer = stepped(2, name)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    other.load_state_dict(found.tensors(MODEL))
    load_optimizer_tensors(other_optimizer, other, found.tensors(OPTIMIZER))
    for seed in range(3):
        torch.manual_seed(seed)
        step(model, optimizer)
        torch.manual_seed(seed)
        step(other, other_optimizer)
    for first, second in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(first, second)


def test_saver__keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    model, optimizer = stepped(0, "sgd")
    saver = Saver(tmp_path, keep=2, frozen=(), team=ALONE)
    for number in range(1, 7):
        best = {"step": 2, "accuracy": 1.0, "loss": 0.0} if number >= 2 else None
        saver.save(model, optimizer, None, Position(step=number, best=best))
    saver.wait()
    assert [found.step for found in list_checkpoints(tmp_path)] == [2, 5, 6]


def test_saver__an_error_of_the_disk_is_raised_at_the_next_save(tmp_path: Path) -> None:
    model, optimizer = stepped(0, "sgd")
    (tmp_path / "file").write_text("in the way")
    saver = Saver(tmp_path / "file", keep=1, frozen=(), team=ALONE)
    saver.save(model, optimizer, None, Position(step=1))
    with pytest.raises(OSError, match="file"):
        saver.save(model, optimizer, None, Position(step=2))


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "state"])
def test_newest__a_damaged_one_is_passed_over_with_a_warning(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = stepped(0, "adamw")
    saver = Saver(tmp_path, keep=9, frozen=(), team=ALONE)
    for number in (1, 2):
        saver.save(model, optimizer, None, Position(step=number))
    saver.wait()
    file = tmp_path / "step-00000002" / ("state.json" if damage == "state" else MODEL)
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-3])
    else:
        content[-2] ^= 1
        file.write_bytes(content)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "the checkpoint step-00000002 is not used" in capsys.readouterr().err


def test_checkpoint__holds_no_pickle(tmp_path: Path) -> None:
    model, optimizer = stepped(0, "adamw")
    saver = Saver(tmp_path, keep=1, frozen=(), team=ALONE)
    saver.save(model, optimizer, None, Position(step=1))
    saver.wait()
    for file in (tmp_path / "step-00000001").iterdir():
        if file.suffix != ".safetensors":
            json.loads(file.read_text())
