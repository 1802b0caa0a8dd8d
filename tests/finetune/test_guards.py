"""What a run says about itself: duplicates across splits, the linear probe, the numbers in TensorBoard."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import make_splits
from tests.support_models import make_bundle
from tests.support_processes import run_ranks
from tldist import api
from tldist.errors import RecipeError
from tldist.finetune import guards

SETTINGS = {
    "image_size": 32, "precision": "fp32", "batch_size": 8, "workers": 0, "epochs": 4,
    "augment": {"crop": None, "flip": False}, "calibrate": False, "cache": "off",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_splits(
        tmp_path_factory.mktemp("data") / "d",
        {"cat": 12, "dog": 10, "emu": 8},
        {"cat": 5, "dog": 5, "emu": 5},
    )


def summary(out: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((out / "summary.json").read_text())


def finetune(data: Path, out: Path, settings: dict[str, object]) -> str:
    return api.finetune(data=str(data), out=out, **{**SETTINGS, **settings}).text


def test_duplicates__between_train_val_and_test_are_counted_and_listed(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "d")
    (tmp_path / "d/test").mkdir()
    shutil.copytree(tmp_path / "d/val/emu", tmp_path / "d/test/emu")
    first = next((tmp_path / "d/train/dog").iterdir())
    shutil.copy(first, tmp_path / "d/val/dog/copy.png")
    settings: dict[str, object] = {"model": "tests.nets:plain_cnn", "weights": "none", "epochs": 1}
    finetune(tmp_path / "d", tmp_path / "r", settings)
    assert summary(tmp_path / "r")["duplicates"] == {"train/val exact": 1, "val/test exact": 5}
    pairs = json.loads((tmp_path / "r/duplicates.json").read_text())["pairs"]
    assert {"kind": "exact", "train": f"train/dog/{first.name}", "val": "val/dog/copy.png"} in pairs
    finetune(tmp_path / "d", tmp_path / "off", {**settings, "guard": {"duplicates": "off"}})
    assert summary(tmp_path / "off")["duplicates"] is None
    api.report(runs=[tmp_path / "r"], out=tmp_path / "report.html")
    assert (
        "Images lie in two splits (1 train/val exact, 5 val/test exact)"
        in (tmp_path / "report.html").read_text()
    )
    run_ranks(finetune, 2, tmp_path / "d", tmp_path / "two", settings)
    assert summary(tmp_path / "two")["duplicates"] == summary(tmp_path / "r")["duplicates"]


def test_duplicates__are_looked_for_once_for_the_same_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {"model": "tests.nets:plain_cnn", "weights": "none", "epochs": 1}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    finetune(data, tmp_path / "first", settings)
    monkeypatch.setattr(guards, "find_duplicates", None)
    finetune(data, tmp_path / "second", settings)
    assert summary(tmp_path / "second")["duplicates"] == summary(tmp_path / "first")["duplicates"] == {}


def test_probe__a_result_below_it_is_reported(data: Path, tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", ("cat", "dog", "emu"))
    ruined = {"model": str(bundle), "optimizer": {"name": "sgd", "lr": 30.0, "warmup": 0.0, "clip": 1e3}}
    text = finetune(data, tmp_path / "bad", {**ruined, "guard": {"probe": "on"}})
    found = summary(tmp_path / "bad")
    assert found["linear_probe"]["accuracy"] > found["validation"]["accuracy"]
    assert "warning: that is below the plain linear probe" in text
    api.report(runs=[tmp_path / "bad"], out=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "The result is below a plain linear probe on the same images" in page
    text = finetune(data, tmp_path / "quiet", {**ruined, "guard": {"probe": "off"}})
    assert "probe" not in text
    assert summary(tmp_path / "quiet")["linear_probe"] is None


def test_probe__is_that_of_scikit_learn_on_the_same_features(data: Path, tmp_path: Path) -> None:
    from tldist import distributed
    from tldist.domain import open_domain
    from tldist.domain.recipe import DataRecipe
    from tldist.features.extract import extract
    from tldist.models.load import load_bundle

    bundle = make_bundle(tmp_path / "b", ("cat", "dog", "emu"))
    # Four epochs of a pre-trained model: measured without being asked for.
    finetune(data, tmp_path / "r", {"model": str(bundle), "optimizer": {"lr": 1e-5}})
    model, config = load_bundle(bundle)
    domain = open_domain(DataRecipe.make(path=str(data)))
    train, val = (
        extract(model, config.preprocessing, domain.split(name), distributed.start(), classes=config.classes)
        for name in ("train", "val")
    )
    best = 0.0
    inputs = train.features.double()
    scale = float((inputs - inputs.mean(0)).square().mean().sqrt())
    for l2 in (1.0, 1e-1, 1e-2, 1e-3, 1e-4):
        head = LogisticRegression(C=1 / (l2 * len(train)), max_iter=5000, tol=1e-8)
        head.fit(train.features.double().numpy() / scale, train.labels.numpy())
        best = max(best, head.score(val.features.double().numpy() / scale, val.labels.numpy()))
    assert summary(tmp_path / "r")["linear_probe"]["accuracy"] == pytest.approx(best)


def test_tensorboard__has_the_numbers_of_metrics_jsonl_also_after_going_on(
    data: Path, tmp_path: Path
) -> None:
    settings: dict[str, object] = {
        "model": "tests.nets:plain_cnn",
        "weights": "none",
        "checkpoint": {"keep": 9},
    }
    finetune(data, tmp_path / "r", settings)
    for path in (tmp_path / "r/checkpoints").glob("step-*"):  # as if killed after the second epoch
        if int(path.name[5:]) > 8:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "r/bundle")
    (tmp_path / "r/summary.json").unlink()
    finetune(data, tmp_path / "r", settings)

    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(tmp_path / "r/tensorboard")).Reload()
    for name in ("loss", "lr", "val_accuracy", "val_loss"):
        ours = [(line["step"], line[name]) for line in lines if name in line]
        theirs = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in theirs] == [step for step, _ in ours]
        assert [value for _, value in theirs] == pytest.approx([value for _, value in ours], rel=1e-6)


def test_trackers__unknown_and_missing_ones_are_named(data: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"model": "tests.nets:plain_cnn", "weights": "none", "epochs": 1}
    with pytest.raises(RecipeError, match=r"track=tensorbord: unknown\. Did you mean: tensorboard"):
        finetune(data, tmp_path / "a", {**settings, "track": ("tensorbord",)})
    with pytest.raises(
        RecipeError, match=r"track=wandb: it is not installed\. Install it with: pip install wandb"
    ):
        finetune(data, tmp_path / "b", {**settings, "track": ("wandb",)})
    finetune(data, tmp_path / "c", {**settings, "track": None})
    assert not (tmp_path / "c/tensorboard").exists()


def test_rate__leaves_out_the_time_of_measuring(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLDIST_TEST_MARKER", str(tmp_path / "marker"))  # 0.3 s a measurement
    torch.set_num_threads(1)
    finetune(
        data, tmp_path / "r", {"model": "tests.nets:slow_cnn", "weights": "none", "guard": {"probe": "off"}}
    )
    lines = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    rates = [line["images_per_second"] for line in lines if "images_per_second" in line]
    firsts = rates[4::4]  # the first step of each later epoch, 8 images
    assert len(firsts) == 3
    assert max(firsts) > 8 / 0.3
