"""The frozen part computed once gives the training that computes it in every epoch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import make_splits
from tests.support_processes import run_ranks
from tldist import api

BASE = {
    "weights": "none",
    "image_size": 32,
    "precision": "fp32",
    "batch_size": 8,
    "epochs": 4,
    "workers": 0,
    "select": "last",
    "optimizer": {"name": "sgd", "lr": 0.02},
}
STILL = {"crop": None, "flip": False}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_splits(
        tmp_path_factory.mktemp("data") / "d", {"cat": 10, "dog": 9, "emu": 8}, {"cat": 3, "dog": 3, "emu": 3}
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle" / "model.safetensors")


def difference(a: Path, b: Path) -> float:
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    return max(float((first[name].double() - second[name].double()).abs().max()) for name in first)


def caches(folder: Path) -> dict[str, float]:
    return {path.name: (path / "features.npy").stat().st_mtime_ns for path in folder.iterdir()}


def finetune(data: Path, out: Path, cache: dict, **settings: object) -> None:  # type: ignore[type-arg]
    api.finetune(data=str(data), out=out, cache=cache, **{**BASE, "model": "resnet18", **settings})


@pytest.mark.parametrize(
    ("model", "train", "augment"),
    [
        ("resnet18", "head", STILL),
        ("resnet18", "last:1", STILL),
        ("squeezenet1_1", "head", STILL),
        ("resnet18", "head", {"views": 2}),
    ],
)
def test_cache__is_the_same_training(
    data: Path, tmp_path: Path, model: str, train: str, augment: dict[str, object]
) -> None:
    how = {"model": model, "train": train, "augment": augment}
    if model == "squeezenet1_1":
        how["image_size"] = 64
    finetune(data, tmp_path / "plain", {"use": "off"}, **how)
    finetune(data, tmp_path / "cached", {"folder": tmp_path / "c"}, **how)
    assert len(caches(tmp_path / "c")) == 2, "the train and the validation features"
    assert difference(tmp_path / "plain", tmp_path / "cached") < 1e-6
    lines = [(out / "metrics.jsonl").read_text().count("val_accuracy") for out in tmp_path.glob("[pc]*ed")]
    assert set(lines) == {4}


def test_cache__another_learning_rate_reads_it_and_other_weights_do_not(data: Path, tmp_path: Path) -> None:
    folder, how = tmp_path / "c", {"train": "head", "augment": STILL}
    finetune(data, tmp_path / "one", {"folder": folder}, **how)
    made = caches(folder)
    finetune(data, tmp_path / "two", {"folder": folder}, **how, optimizer={"name": "sgd", "lr": 0.5})
    assert caches(folder) == made
    assert difference(tmp_path / "one", tmp_path / "two") > 1e-3
    finetune(data, tmp_path / "three", {"folder": folder}, **how, seed=1)
    assert len(caches(folder)) == 4, "another seed draws other random weights"


def _two(data: Path, out: Path) -> None:
    finetune(data, out, {"folder": out.parent / "c2"}, train="head", augment=STILL)


def test_cache__two_processes_fill_it_as_one(data: Path, tmp_path: Path) -> None:
    run_ranks(_two, 2, data, tmp_path / "two")
    finetune(data, tmp_path / "one", {"folder": tmp_path / "c1"}, train="head", augment=STILL)
    assert difference(tmp_path / "one", tmp_path / "two") < 1e-6


def test_cache__bf16_rounds_the_features(data: Path, tmp_path: Path) -> None:
    how = {"train": "head", "augment": STILL}
    finetune(data, tmp_path / "whole", {"folder": tmp_path / "c"}, **how)
    finetune(data, tmp_path / "half", {"folder": tmp_path / "h", "dtype": "bf16"}, **how)
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).rglob("features.npy")) for n in ("c", "h")]
    assert sizes[1] < 0.6 * sizes[0]
    assert 0 < difference(tmp_path / "whole", tmp_path / "half") < 0.02


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"augment": {}}, "augmentation changes the images"),
        ({"augment": STILL, "epochs": 1}, "would not pay"),
        ({"augment": STILL, "cache": {"max_gb": 1e-6}}, "the limit is 0.0"),
        ({"augment": STILL, "model": "tests.nets:branching_cnn"}, "cannot be cut"),
    ],
)
def test_cache__falls_back_and_says_why(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, object], reason: str
) -> None:
    cache = settings.pop("cache", {"folder": tmp_path / "c"})
    finetune(data, tmp_path / "r", cache, train="head", **settings)  # type: ignore[arg-type]
    assert reason in capsys.readouterr().out
    assert not (tmp_path / "c").exists()
