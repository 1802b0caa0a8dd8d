"""A sweep of linear probes is the same as training each of them alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file

from tests.support import make_images, make_splits
from tldist import api
from tldist.errors import RecipeError

RATES, DECAYS = (0.3, 0.003), (0.0, 0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_splits(
        tmp_path_factory.mktemp("data") / "d",
        {"cat": 12, "dog": 10, "emu": 8},
        {"cat": 5, "dog": 5, "emu": 5},
    )


def probe(data: Path, out: Path, model: str = "resnet18", **settings: object) -> dict:  # type: ignore[type-arg]
    api.finetune(
        **{
            "data": str(data),
            "model": model,
            "out": out,
            "weights": "none",
            "train": "head",
            "epochs": 3,
            "image_size": 64 if model == "squeezenet1_1" else 32,
            "precision": "fp32",
            "batch_size": 8,
            "workers": 0,
            "augment": {"crop": None, "flip": False},
            "cache": {"folder": out.parent / "cache"},
            "calibrate": False,
            **settings,
        }
    )
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(("model", "optimizer"), [("resnet18", "sgd"), ("squeezenet1_1", "adamw")])
def test_sweep__keeps_what_the_best_probe_alone_reaches(
    data: Path, tmp_path: Path, model: str, optimizer: str
) -> None:
    grid = {"lr": RATES, "weight_decay": DECAYS}
    swept = probe(data, tmp_path / "swept", model, sweep=grid, optimizer={"name": optimizer}, select="last")
    alone = {}
    for lr in RATES:
        for decay in DECAYS:
            out = tmp_path / f"{lr}-{decay}"
            settings = {"name": optimizer, "lr": lr, "weight_decay": decay}
            alone[lr, decay] = probe(data, out, model, optimizer=settings, select="last")["validation"]
    for row in swept["sweep"]:
        one = alone[row["lr"], row["weight_decay"]]
        assert row["accuracy"] == one["accuracy"]
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-4)
    best = swept["sweep"][0]
    assert best["accuracy"] == max(row["accuracy"] for row in swept["sweep"])
    assert swept["validation"]["accuracy"] == best["accuracy"]
    state = load_file(tmp_path / "swept" / "bundle" / "model.safetensors")
    getattr(torchvision.models, model)(num_classes=3).load_state_dict(state)
    kept = load_file(tmp_path / f"{best['lr']}-{best['weight_decay']}" / "bundle" / "model.safetensors")
    assert max(float((kept[n].double() - state[n].double()).abs().max()) for n in kept) < 1e-5


def test_sweep__runs_without_a_cache_too(data: Path, tmp_path: Path) -> None:
    swept = probe(data, tmp_path / "a", sweep={"lr": RATES})
    plain = probe(data, tmp_path / "b", sweep={"lr": RATES}, cache="off")
    for first, second in zip(swept["sweep"], plain["sweep"]):
        assert first == pytest.approx(second, rel=1e-4)
    first, second = (load_file(tmp_path / n / "bundle" / "model.safetensors") for n in "ab")
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def test_sweep__what_it_cannot_be_combined_with(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="goes with train=head"):
        probe(data, tmp_path / "r", sweep={"lr": RATES}, train="all")
    (data.parent / "t" / "train").parent.mkdir(exist_ok=True)
    make_images(data.parent / "only", {"a": 3, "b": 3})
    with pytest.raises(RecipeError, match="chooses on validation"):
        probe(data.parent / "only", tmp_path / "s", sweep={"lr": RATES}, validation=0)
