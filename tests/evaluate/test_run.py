"""`tldist evaluate` from outside: bundles and packages, by class names, on any number of processes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support import make_images
from tests.support_models import SMALL, lively_model, make_bundle
from tests.support_processes import RanksFailed, run_ranks
from tldist import api
from tldist.bundle import BundleConfig
from tldist.errors import BundleError, DomainError, ModelError, RecipeError
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.zoo import describe_network
from tldist.runtime.preprocess import prepare

NAMES = tuple(str(number) for number in range(1, 13))
COUNTS = {name: 1 + int(name) % 3 for name in NAMES}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", dict.fromkeys(NAMES, 1))
    make_images(root / "val", COUNTS, seed=3)
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle", NAMES, name="squeezenet1_1", seed=1)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> Path:
    out = tmp_path_factory.mktemp("package") / "p"
    api.export(bundle=bundle, profile="cpu-fp32", out=out)
    return out


def by_hand(bundle: Path, folder: Path, classes: tuple[str, ...] = NAMES) -> tuple[float, float]:
    """Accuracy and loss by the definition, from the files, by the names of their folders."""
    model, config = load_bundle(bundle)
    files = sorted(folder.rglob("*.png"))
    pictures = np.stack([prepare(file.read_bytes(), config.preprocessing) for file in files])
    with torch.no_grad():
        logits = model(input_tensor(torch.from_numpy(pictures), config.preprocessing)).double().numpy()
    truth = np.array([classes.index(file.parent.name) for file in files])
    shifted = logits - logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(files)), truth]
    return float((logits.argmax(1) == truth).mean()), float(losses.mean())


def test_evaluate__folders_named_1_to_12_by_the_definition(bundle: Path, data: Path) -> None:
    found = api.evaluate(model=bundle, data=data, workers=0).values
    accuracy, loss = by_hand(bundle, data / "val")
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-12)
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    assert found["count"] == sum(COUNTS.values())  # the val split, not train
    assert found["classes"] == list(NAMES)
    assert [sum(row) for row in found["confusion"]] == [COUNTS[name] for name in NAMES]


def test_evaluate__the_models_class_order_does_not_matter(tmp_path: Path, bundle: Path, data: Path) -> None:
    """The same model with rows and names permuted gives the same numbers, class by class."""
    model, config = load_bundle(bundle)
    order = np.random.default_rng(0).permutation(12)
    head = model.classifier[1]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    save_bundle(tmp_path / "p", model, replace(config, classes=tuple(NAMES[row] for row in order)))
    plain, permuted = (api.evaluate(model=m, data=data, workers=0).values for m in (bundle, tmp_path / "p"))
    assert permuted["accuracy"] == plain["accuracy"]
    assert permuted["loss"] == pytest.approx(plain["loss"], abs=1e-6)
    assert permuted["per_class"] == plain["per_class"]


def test_evaluate__a_domain_may_lack_classes(tmp_path: Path, bundle: Path) -> None:
    folder = make_images(tmp_path / "few", {"10": 3, "2": 2})
    found = api.evaluate(model=bundle, data=folder, workers=0)
    assert found.values["accuracy"] == pytest.approx(by_hand(bundle, folder)[0])
    assert list(found.values["per_class"]) == ["2", "10"]
    assert "most taken for" in found.text


def test_evaluate__package_agrees_with_its_bundle(bundle: Path, package: Path, data: Path) -> None:
    plain, exported = (api.evaluate(model=model, data=data, workers=0).values for model in (bundle, package))
    assert exported["accuracy"] == plain["accuracy"]
    assert exported["loss"] == pytest.approx(plain["loss"], abs=1e-4)
    assert exported["confusion"] == plain["confusion"]


def test_evaluate__split_that_is_asked_for(bundle: Path, data: Path) -> None:
    found = api.evaluate(model=bundle, data={"path": str(data), "split": "train"}, workers=0).values
    assert found["count"] == 12


def _evaluate(model: Path, data: Path, batch_size: int) -> dict:
    return api.evaluate(model=model, data=data, workers=0, batch_size=batch_size).values


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_evaluate__processes_do_not_matter(bundle: Path, package: Path, data: Path, batch_size: int) -> None:
    for model in (bundle, package):
        one = run_ranks(_evaluate, 1, model, data, batch_size)[0]
        for found in run_ranks(_evaluate, 2, model, data, batch_size):
            assert found == one


def test_evaluate__run_folder(tmp_path: Path, bundle: Path, data: Path) -> None:
    found = api.evaluate(model=bundle, data=data, workers=0, out=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["measurement"] == found.values
    again = api.evaluate(model=bundle, data=data, workers=0, out=tmp_path / "run")
    assert again.values == found.values
    with pytest.raises(RecipeError, match="other data"):
        api.evaluate(model=bundle, data=data / "train", workers=0, out=tmp_path / "run")


# -- refusals ----------------------------------------------------------------------------------------------


def test_evaluate__no_labels(tmp_path: Path, bundle: Path, data: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    (flat / "a.png").write_bytes(next(data.rglob("*.png")).read_bytes())
    with pytest.raises(DomainError, match="no labels"):
        api.evaluate(model=bundle, data=flat, workers=0)


def test_evaluate__unknown_class_is_named(tmp_path: Path, bundle: Path) -> None:
    folder = make_images(tmp_path / "x", {"1": 1, "thirteen": 1})
    with pytest.raises(DomainError, match="thirteen"):
        api.evaluate(model=bundle, data=folder, workers=0)


def test_evaluate__neither_bundle_nor_package(tmp_path: Path, data: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        api.evaluate(model=tmp_path / "nowhere", data=data)
    with pytest.raises(BundleError, match="not a bundle"):
        api.evaluate(model=tmp_path, data=data)


def test_evaluate__truncated_weights(tmp_path: Path, data: Path) -> None:
    bundle = make_bundle(tmp_path / "b", NAMES, name="squeezenet1_1")
    weights = bundle / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BundleError, match=r"model\.safetensors"):
        api.evaluate(model=bundle, data=data, workers=0)


def test_evaluate__feature_extractor(tmp_path: Path, data: Path) -> None:
    config = BundleConfig(describe_network("squeezenet1_1", 7), (), SMALL)
    save_bundle(tmp_path / "b", lively_model("squeezenet1_1", 7), config)
    with pytest.raises(BundleError, match="feature extractor"):
        api.evaluate(model=tmp_path / "b", data=data, workers=0)


def test_evaluate__outputs_that_are_not_finite_stop_every_process(tmp_path: Path, data: Path) -> None:
    model = lively_model("squeezenet1_1", 12)
    model.classifier[1].bias.data[3] = float("nan")
    save_bundle(tmp_path / "b", model, BundleConfig(describe_network("squeezenet1_1", 12), NAMES, SMALL))
    with pytest.raises(ModelError, match="not finite"):
        api.evaluate(model=tmp_path / "b", data=data, workers=0)
    with pytest.raises(RanksFailed) as failed:
        run_ranks(_evaluate, 2, tmp_path / "b", data, 4)
    assert [name for name, _ in failed.value.errors.values()] == ["ModelError"] * 2
