"""Models of different architectures, fused by commands as typed, exported and checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import make_splits, run_tldist
from tests.support_models import make_bundle
from tldist import api
from tldist.bundle import read_bundle
from tldist.data.loader import load_batches
from tldist.domain import open_domain
from tldist.errors import RecipeError
from tldist.models.load import input_tensor, load_bundle


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = ("one", "two", "three")
    return make_splits(tmp_path_factory.mktemp("data"), dict.fromkeys(names, 20), dict.fromkeys(names, 8))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    classes = open_domain(data).classes
    return [
        make_bundle(root / "small", classes, name="mobilenet_v3_small", seed=1),
        make_bundle(root / "plain", tuple(reversed(classes)), name="tests.nets:plain_cnn", seed=2),
    ]


def probabilities(path: Path, data: Path, split: str) -> tuple[np.ndarray, tuple[str, ...]]:
    model, config = load_bundle(path, trust_code=True)
    domain = open_domain(data).split(split)
    batch = next(iter(load_batches(domain, [np.arange(len(domain))], config.preprocessing)))
    with torch.no_grad():
        logits = model(input_tensor(batch.images, config.preprocessing)).double()
    return logits.softmax(1).numpy(), config.classes


@pytest.mark.parametrize("combine", ["probabilities", "stacking"])
def test_ensemble__is_one_bundle_and_one_graph(
    tmp_path: Path, models: list[Path], data: Path, combine: str
) -> None:
    run = tmp_path / "run"
    fused = run_tldist(
        "fuse", *models, "method=ensemble", f"ensemble={combine}", f"data={data}", f"out={run}",
        "trust_code=true", "workers=0",
    )  # fmt: skip
    assert fused.returncode == 0, fused.stderr
    found, classes = probabilities(run, data, "val")
    summary = json.loads((run / "summary.json").read_text())
    weights = np.array([0.5, 0.5])
    if combine == "stacking":
        weights = np.array(summary["stacking"]["weights"])
        weights = weights / weights.sum()
    expected = np.zeros_like(found)
    for weight, path in zip(weights, models):
        own, names = probabilities(path, data, "val")
        expected += weight * own[:, [names.index(name) for name in classes]]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    assert summary["after"]["count"] == len(open_domain(data).split("val"))
    exported = run_tldist("export", run, "profile=cpu-fp32", f"out={tmp_path / 'package'}", "trust_code=true")
    assert exported.returncode == 0, exported.stderr
    assert read_bundle(run)[1].lineage["parents"][1]["identity"] == read_bundle(models[1])[1].identity


def test_concat__is_one_head_on_both_backbones(tmp_path: Path, models: list[Path], data: Path) -> None:
    run = tmp_path / "run"
    outcome = api.fuse(
        bundles=models, method="concat", data=data, concat=16, out=run, trust_code=True, workers=0
    )
    alone = [api.evaluate(model=m, data=data, workers=0, trust_code=True).values["accuracy"] for m in models]
    assert outcome.values["accuracy"] > max(alone)  # their heads are random, the new one is not
    exported = run_tldist("export", run, "profile=cpu-fp32", f"out={tmp_path / 'p'}", "trust_code=true")
    assert exported.returncode == 0, exported.stderr


def test_families__say_what_they_need(tmp_path: Path, models: list[Path], data: Path) -> None:
    common = {"bundles": models, "out": tmp_path / "run", "trust_code": True, "workers": 0}
    with pytest.raises(RecipeError, match="stacking fits shares on labelled data"):
        api.fuse(method="ensemble", ensemble="stacking", **common)
    common["out"] = tmp_path / "other"
    with pytest.raises(RecipeError, match="the one gives the shares, the other fits"):
        api.fuse(method="ensemble", ensemble="stacking", weights=(1, 2), data=data, **common)
    with pytest.raises(RecipeError, match="classes of data="):
        api.fuse(method="concat", **common)


def test_distill__two_half_models_teach_one_student(tmp_path: Path, data: Path) -> None:
    """Each teacher knows two of three classes; the student, of another architecture, answers all."""
    classes = open_domain(data).classes
    teachers = []
    for number, known in enumerate((classes[:2], classes[1:])):
        part = tmp_path / f"part{number}"
        for split in ("train", "val"):
            for name in known:
                (part / split).mkdir(parents=True, exist_ok=True)
                (part / split / name).symlink_to(data / split / name)
        api.finetune(
            data=part, model="tests.nets:plain_cnn", weights="none", out=tmp_path / f"t{number}", epochs=12,
            batch_size=8, optimizer={"lr": 5e-3}, seed=number, trust_code=True, workers=0, image_size=32,
        )  # fmt: skip
        teachers.append(tmp_path / f"t{number}")
    outcome = api.fuse(
        bundles=teachers,
        method="distill",
        data=data,
        distill={
            "model": "tests.nets:plain_cnn",
            "weights": "none",
            "epochs": 12,
            "lr": 5e-3,
            "batch_size": 12,
            "augment": False,
            "labels_share": 0.0,
        },
        out=tmp_path / "run",
        trust_code=True,
        workers=0,
    )
    assert read_bundle(tmp_path / "run")[1].classes == classes
    assert outcome.values["accuracy"] > 2 / 3  # more than either teacher can reach
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] == {}  # neither knows all classes of data=
    assert not (tmp_path / "run" / "work").exists()
    lineage = read_bundle(tmp_path / "run")[1].lineage
    assert [row["identity"] for row in lineage["parents"]] == [read_bundle(t)[1].identity for t in teachers]
