"""What learns, when, and what is kept: patterns, phases, averages, mixing, patience, broken numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import make_images, make_splits
from tests.support_processes import run_ranks
from tldist import api
from tldist.data.order import seed_of
from tldist.errors import Diverged, MachineError, RecipeError
from tldist.finetune.phases import plan_phases
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.load import load_bundle, start_model
from tldist.training.checkpoint import AVERAGE, MODEL

BASE = {
    "model": "tests.nets:recording_cnn",
    "weights": "none",
    "image_size": 32,
    "precision": "fp32",
    "batch_size": 8,
    "workers": 0,
    "augment": {"crop": None, "flip": False},
    "cache": "off",
    "calibrate": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_splits(
        tmp_path_factory.mktemp("data") / "d", {"cat": 10, "dog": 8, "emu": 6}, {"cat": 4, "dog": 4, "emu": 4}
    )


def finetune(data: Path, out: Path, **settings: object) -> dict[str, torch.Tensor]:
    api.finetune(data=str(data), out=out, **{**BASE, **settings})
    return load_file(out / "bundle" / "model.safetensors")


def start() -> dict[str, torch.Tensor]:
    torch.manual_seed(seed_of("init", 0))
    return start_model(BASE["model"], "none", ("cat", "dog", "emu"), image_size=32).model.state_dict()


def changed(after: dict[str, torch.Tensor]) -> set[str]:
    before = start()
    return {name for name in before if not torch.equal(before[name], after[name])}


def lines(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_train_pattern__only_what_it_finds_learns(data: Path, tmp_path: Path) -> None:
    after = finetune(data, tmp_path / "r", epochs=1, train=r"re:bias$")
    assert changed(after) == {
        "1.bias", "2.bias", "4.bias", "5.bias", "10.bias",
        *(f"{bn}.running_{what}" for bn in (2, 5) for what in ("mean", "var")),
        "2.num_batches_tracked", "5.num_batches_tracked",
    }  # fmt: skip


def test_train_pattern__that_finds_nothing_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"finds no parameter \(there are 1\.weight"):
        finetune(data, tmp_path / "r", train="re:transformer")
    with pytest.raises(RecipeError, match="not a regular expression"):
        finetune(data, tmp_path / "s", train="re:(")


def test_phases__probe_then_unfreezing() -> None:
    recipe = FinetuneRecipe.make(
        data="d", model="m", out="o", epochs=6, probe=3, train="head", unfreeze=("2:last:1", "4:all")
    )
    found = [
        (p.first_epoch, p.last_epoch, p.train, p.schedule_first, p.schedule_last) for p in plan_phases(recipe)
    ]
    assert found == [
        (0, 3, "head", 0, 3), (3, 5, "head", 3, 9), (5, 7, "last:1", 3, 9), (7, 9, "all", 3, 9),
    ]  # fmt: skip
    with pytest.raises(RecipeError, match="must rise and lie below epochs=6"):
        plan_phases(recipe.replace(unfreeze=("4:all", "2:last:1")))


def test_lp_ft__the_backbone_rests_while_the_head_is_probed(data: Path, tmp_path: Path) -> None:
    finetune(data, tmp_path / "r", epochs=1, probe={"epochs": 2}, checkpoint={"keep": 9}, select="last")
    saved = {path.name: load_file(path / MODEL) for path in (tmp_path / "r" / "checkpoints").glob("step-*")}
    assert changed(saved["step-00000006"]) == {"10.weight", "10.bias"}
    assert "1.weight" in changed(saved["step-00000009"])


def test_ema__is_the_moving_average_of_the_weights(data: Path, tmp_path: Path) -> None:
    decay = 0.8
    kept = finetune(
        data, tmp_path / "r", epochs=2, ema=decay, select="last", checkpoint={"every_steps": 1, "keep": 99}
    )
    saved = sorted((tmp_path / "r" / "checkpoints").glob("step-*"))
    # As torch.optim.swa_utils does: the first update copies, the later ones average.
    average = {name: tensor.double() for name, tensor in load_file(saved[0] / MODEL).items()}
    for path in saved[1:]:
        weights = load_file(path / MODEL)
        average = {name: decay * average[name] + (1 - decay) * weights[name].double() for name in average}
    for name, tensor in kept.items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor.double(), average[name], atol=1e-6), name
    assert (saved[-1] / AVERAGE).is_file()
    last = load_file(saved[-1] / MODEL)
    assert any(not torch.equal(kept[name], last[name]) for name in kept)


def test_mixing__changes_the_training_and_is_repeatable(data: Path, tmp_path: Path) -> None:
    plain = finetune(data, tmp_path / "plain", epochs=1)
    mixed = {**BASE["augment"], "mixup": 0.4, "cutmix": 1.0}  # type: ignore[dict-item]
    first = finetune(data, tmp_path / "one", epochs=1, augment=mixed)
    second = finetune(data, tmp_path / "two", epochs=1, augment=mixed)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_policy__is_repeatable_and_new_each_epoch(data: Path, tmp_path: Path, policy: str) -> None:
    from tldist.data.augment import Augmentation, augment
    from tldist.runtime.preprocess import Preprocessing, prepare

    photo, how = (data / "train" / "cat" / "0.png").read_bytes(), Preprocessing(32, 32, 32)
    what = Augmentation(crop=None, flip=False, policy=policy)
    views = [augment(photo, how, what, 0, epoch, 5) for epoch in range(8)]
    assert all((augment(photo, how, what, 0, epoch, 5) == views[epoch]).all() for epoch in range(8))
    assert len({view.tobytes() for view in views}) >= 6
    assert any((view != prepare(photo, how)).any() for view in views)


def test_patience__ends_early_and_stays_ended(data: Path, tmp_path: Path) -> None:
    # A rate so small that nothing changes: no epoch after the first is better.
    settings = {"epochs": 30, "patience": 2, "optimizer": {"lr": 1e-12}, "train": "head"}
    finetune(data, tmp_path / "r", **settings)
    measured = [line for line in lines(tmp_path / "r") if "val_accuracy" in line]
    assert len(measured) < 30
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["steps"] == summary["selected_step"] + 2 * 3
    assert "finished already" in api.finetune(data=str(data), out=tmp_path / "r", **{**BASE, **settings}).text


def test_not_finite__names_the_step_and_the_images_and_saves_nothing_after(
    data: Path, tmp_path: Path
) -> None:
    with pytest.raises(Diverged, match=r"loss of step 1 is not finite .*positions \d+, \d+"):
        finetune(data, tmp_path / "r", model="tests.nets:nan_cnn")
    record = json.loads((tmp_path / "r" / "not_finite-step-00000001.json").read_text())
    assert len(set(record["positions"])) == 8
    assert not list((tmp_path / "r").rglob("step-*/*"))
    assert json.loads((tmp_path / "r" / "summary.json").read_text())["status"] == "failed"


def test_gradient_checkpointing__is_the_same_training(data: Path, tmp_path: Path) -> None:
    settings = {"model": "resnet18", "epochs": 1, "select": "last"}
    plain = finetune(data, tmp_path / "plain", **settings)
    again = finetune(data, tmp_path / "again", gradient_checkpointing=True, **settings)
    worst = max(float((plain[name].double() - again[name].double()).abs().max()) for name in plain)
    # Recomputing runs BatchNorm twice a step, so its statistics move faster; the weights do not differ.
    worst_weight = max(
        float((plain[name] - again[name]).abs().max())
        for name in plain
        if "running" not in name and "num" not in name
    )
    assert worst_weight < 1e-6 <= 1 + worst


def test_calibration__goes_with_the_bundle(data: Path, tmp_path: Path) -> None:
    finetune(data, tmp_path / "r", epochs=2, calibrate=True)
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    _, config = load_bundle(tmp_path / "r", trust_code=True)
    assert config.temperature == summary["calibration"]["temperature"] != 1.0


def test_sync_batchnorm__on_a_cpu_is_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="sync_batchnorm=true needs GPUs"):
        finetune(data, tmp_path / "r", sync_batchnorm=True)


def _one_image_left(folder: Path, out: Path) -> None:
    settings = {"model": "resnet18", "epochs": 1, "batch_size": 10, "validation": 0}
    finetune(folder, out, **settings)


@pytest.mark.parametrize("ranks", [1, 2])
def test_last_batch__of_one_image_and_live_batchnorm(tmp_path: Path, ranks: int) -> None:
    """One image has no variance over the batch where the network ends at 1x1."""
    folder = make_images(tmp_path / "d", {"a": 6, "b": 5})
    run_ranks(_one_image_left, ranks, folder, tmp_path / "r")
    state = load_file(tmp_path / "r" / "bundle" / "model.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
    assert state["bn1.num_batches_tracked"] == 1, "the batch of one image does not count"
