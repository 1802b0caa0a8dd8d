"""`tldist align` from outside: what its bundle computes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

from tests.support import make_images
from tests.support_models import SMALL, make_bundle
from tests.support_processes import run_ranks
from tldist import api, distributed
from tldist.align.domains import choose_samples, choose_told
from tldist.align.methods import METHODS
from tldist.align.weights import WEIGHTS
from tldist.bundle import BundleConfig, read_bundle
from tldist.data.loader import load_batches
from tldist.domain import open_domain
from tldist.errors import BundleError, DomainError, ModelError, RecipeError
from tldist.features.extract import extract
from tldist.features.heads import fit_logistic
from tldist.features.nearest import fit_class_means, fit_neighbours
from tldist.models.description import architecture_name
from tldist.models.load import load_bundle, save_bundle
from tldist.models.zoo import build_network, describe_network
from tldist.training.measure import predictor

CLASSES = {"a1": 12, "a2": 12, "a10": 12}
NAMES = ("a1", "a2", "a10")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("source"), CLASSES)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other images of the same classes, darker and with less contrast; with train and test."""
    root = tmp_path_factory.mktemp("target")
    make_images(root / "train", {"a2": 8, "a10": 8, "a1": 8}, seed=1)
    make_images(root / "test", {"a10": 6, "a1": 6, "a2": 6}, seed=2)
    for file in root.rglob("*.png"):
        Image.fromarray((np.array(Image.open(file)) * 0.4 + 20).astype(np.uint8)).save(file)
    return root


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle", NAMES)


@pytest.fixture(scope="module")
def aligned(
    tmp_path_factory: pytest.TempPathFactory, bundle: Path, source: Path, target: Path
) -> dict[str, Path]:
    """A finished run of each method."""
    root = tmp_path_factory.mktemp("aligned")
    for method in ("standardize", "coral"):
        api.align(bundle=bundle, source=source, target=target, method=method, out=root / method, workers=0)
    return {method: root / method for method in ("standardize", "coral")}


def features_of(bundle: Path, folder: Path) -> np.ndarray:
    model, config = load_bundle(bundle)
    return (
        extract(model, config.preprocessing, open_domain(folder), distributed.start())
        .features.double()
        .numpy()
    )


def logits_of(bundle: Path, folder: Path) -> np.ndarray:
    """All logits of a bundle, through the model as it is saved."""
    model, config = load_bundle(bundle)
    domain = open_domain(folder)
    batch = next(load_batches(domain, [np.arange(len(domain))], config.preprocessing))
    return predictor(model, config.preprocessing)(batch.images).double().numpy()


def deviation(values: np.ndarray) -> np.ndarray:
    """What standardize divides by at its default ridge."""
    variance = values.var(0, ddof=1)
    return np.sqrt(variance + 0.01 * variance.mean())


def test_align__coral_keeps_the_targets_path_and_refits_the_head(
    aligned: dict[str, Path], bundle: Path, target: Path
) -> None:
    tensors = load_file(aligned["coral"] / "bundle" / "model.safetensors")
    config = read_bundle(aligned["coral"])[1]
    assert config.model["transforms"] == []
    assert config.model["head"] == {"type": "linear", "in": 512, "out": 3}
    expected = features_of(bundle, target / "test") @ tensors["head.weight"].T + tensors["head.bias"]
    np.testing.assert_allclose(logits_of(aligned["coral"], target / "test"), expected, rtol=1e-4, atol=1e-4)


def test_align__standardize_standardises_by_the_targets_train_split(
    aligned: dict[str, Path], bundle: Path, target: Path
) -> None:
    tensors = load_file(aligned["standardize"] / "bundle" / "model.safetensors")
    train = features_of(bundle, target / "train")
    standard = (features_of(bundle, target / "test") - train.mean(0)) / deviation(train)
    expected = standard @ tensors["head.weight"].T + tensors["head.bias"]
    np.testing.assert_allclose(
        logits_of(aligned["standardize"], target / "test"), expected, rtol=1e-3, atol=1e-3
    )


def test_align__head_is_fitted_on_the_mapped_source(
    aligned: dict[str, Path], bundle: Path, source: Path
) -> None:
    """At the optimum the gradient of the penalised loss vanishes, over all of the source."""
    tensors = load_file(aligned["standardize"] / "bundle" / "model.safetensors")
    features = features_of(bundle, source)
    standard = (features - features.mean(0)) / deviation(features)
    labels = np.repeat(np.arange(3), 12)
    logits = standard @ tensors["head.weight"].T + tensors["head.bias"]
    errors = torch.softmax(torch.from_numpy(logits), 1).numpy() - np.eye(3)[labels]
    l2 = json.loads((aligned["standardize"] / "summary.json").read_text())["l2"]
    scale = np.sqrt((standard**2).mean())
    gradient = errors.T @ standard / len(labels) + l2 * scale**2 * tensors["head.weight"]
    assert np.abs(gradient).max() < 1e-5
    assert np.abs(errors.mean(0)).max() < 1e-5


def test_align__summary_and_bundle_say_what_happened(aligned: dict[str, Path], bundle: Path) -> None:
    for method, run in aligned.items():
        summary = json.loads((run / "summary.json").read_text())
        assert summary["status"] == "done"
        assert summary["before"]["count"] == summary["after"]["count"] == 18
        config = read_bundle(run)[1]
        assert config.classes == NAMES
        assert config.lineage["method"] == method
        assert config.lineage["parents"][0]["identity"] == read_bundle(bundle)[1].identity
        assert config.metrics["target_accuracy"] == summary["after"]["accuracy"]
        assert summary["identity"] == config.identity


def test_align__evaluate_reproduces_the_reported_accuracy(aligned: dict[str, Path], target: Path) -> None:
    found = api.evaluate(model=aligned["coral"], data=target, workers=0)
    summary = json.loads((aligned["coral"] / "summary.json").read_text())
    assert found.values["accuracy"] == summary["after"]["accuracy"]
    assert found.values["loss"] == pytest.approx(summary["after"]["loss"], abs=1e-6)


def test_align__again_says_that_it_is_finished(
    aligned: dict[str, Path], bundle: Path, source: Path, target: Path
) -> None:
    before = (aligned["coral"] / "bundle" / "model.safetensors").stat().st_mtime_ns
    again = api.align(
        bundle=bundle, source=source, target=target, method="coral", out=aligned["coral"], workers=0
    )
    assert "finished already" in again.text
    assert (aligned["coral"] / "bundle" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(RecipeError, match="method=coral"):
        api.align(bundle=bundle, source=source, target=target, method="standardize", out=aligned["coral"])
    with pytest.raises(RecipeError, match="other target"):
        api.align(bundle=bundle, source=source, target=source, method="coral", out=aligned["coral"])


@pytest.mark.parametrize("method", ["standardize", "coral"])
def test_align__a_chain_is_composed(
    tmp_path: Path, aligned: dict[str, Path], bundle: Path, source: Path, target: Path, method: str
) -> None:
    first = aligned["standardize"]
    api.align(bundle=first, source=source, target=target, method=method, out=tmp_path / "run", workers=0)
    config = read_bundle(tmp_path / "run")[1]
    count = {"standardize": 2, "coral": 1}[method]
    assert [part["type"] for part in config.model["transforms"]] == ["scale"] * count
    assert config.model["backbone"] == describe_network("resnet18", 3)
    tensors = load_file(tmp_path / "run" / "bundle" / "model.safetensors")
    values = features_of(bundle, target / "test")
    for place in range(count):
        values = values * tensors[f"transforms.{place}.weight"] + tensors[f"transforms.{place}.bias"]
    expected = values @ tensors["head.weight"].T + tensors["head.bias"]
    np.testing.assert_allclose(logits_of(tmp_path / "run", target / "test"), expected, rtol=1e-3, atol=1e-3)


def test_align__target_without_labels_gives_the_same_model(
    tmp_path: Path, aligned: dict[str, Path], bundle: Path, source: Path, target: Path
) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, file in enumerate(sorted((target / "train").rglob("*.png"))):
        (loose / f"{number}.png").write_bytes(file.read_bytes())
    outcome = api.align(
        bundle=bundle, source=source, target=loose, method="coral", out=tmp_path / "run", workers=0
    )
    assert outcome.values["accuracy"] is None
    found, expected = (
        load_file(run / "bundle" / "model.safetensors") for run in (tmp_path / "run", aligned["coral"])
    )
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-5, atol=1e-6)


def _align(bundle: Path, source: Path, target: Path, out: Path, options: dict[str, Any]) -> float:
    return api.align(
        bundle=bundle, source=source, target=target, out=out, workers=0, batch_size=5, **options
    ).values["accuracy"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "standardize", "head": "knn"},
        {"method": "coral", "samples": 20, "weights": "kmm"},
        {"method": "jda", "samples": 20, "target_labels": 2},
    ],
    ids=["standardize", "coral", "jda"],
)
def test_align__two_processes_give_the_model_of_one(
    tmp_path: Path, bundle: Path, source: Path, target: Path, options: dict[str, Any]
) -> None:
    one = run_ranks(_align, 1, bundle, source, target, tmp_path / "one", options)
    two = run_ranks(_align, 2, bundle, source, target, tmp_path / "two", options)
    assert two == one * 2
    first, second = (load_file(tmp_path / run / "bundle" / "model.safetensors") for run in ("one", "two"))
    for name, tensor in first.items():
        np.testing.assert_allclose(second[name], tensor, rtol=1e-6, atol=1e-6, err_msg=name)


# -- every method, head and weight, on a small network -------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("small") / "bundle", NAMES, name="tests.nets:plain_cnn")


@pytest.fixture
def align(small: Path, source: Path, target: Path, tmp_path: Path) -> Callable[..., Path]:
    """Align the small network; gives the run."""

    def run(**options: Any) -> Path:
        given = {"bundle": small, "source": source, "target": target, "workers": 0, "trust_code": True}
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        api.align(**{**given, "out": out, **options})
        return out

    return run


def kept_features(bundle: Path, folder: Path, trust_code: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    model, config = load_bundle(bundle, trust_code=trust_code)
    domain = open_domain(folder).training_split()
    found = extract(model, config.preprocessing, domain, distributed.start(), classes=NAMES)
    return found.features.double(), found.labels


def answers(run: Path, folder: Path) -> torch.Tensor:
    """What a run's bundle answers to a folder's training images, in order."""
    model, config = load_bundle(run, trust_code=True)
    domain = open_domain(folder).training_split()
    batch = next(load_batches(domain, [np.arange(len(domain))], config.preprocessing))
    return predictor(model, config.preprocessing)(batch.images).double()


SETTINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "pca": {"dims": 5},
    "whiten": {"kind": "pca", "dims": 4},
    "monge": {"ridge": 0.1},
    "subspace": {"dims": 3},
    "gfk": {"dims": 2},
    "tca": {"dims": 3, "landmarks": 20},
    "jda": {"dims": 3, "ridge": 1.0, "iterations": 3},
    "mlp": {"dims": 4, "iterations": 20, "kind": "coral", "strength": 2.0},
}


@pytest.mark.parametrize("method", SETTINGS)
def test_align__is_the_function_on_features_and_a_head(
    align: Callable[..., Path], small: Path, source: Path, target: Path, method: str
) -> None:
    """The model of the stage, against the method and the head called from Python."""
    options = SETTINGS[method]
    run = align(method=method, seed=3, **options)
    (ours, labels), (theirs, _) = (kept_features(small, folder) for folder in (source, target))
    known = {"source_labels": labels} if METHODS[method].labels else {}
    seed = {"seed": 3} if "seed" in METHODS[method].options else {}
    fit = METHODS[method](ours, theirs, **known, **options, **seed)
    l2 = read_bundle(run)[1].lineage["l2"]
    head = fit_logistic(fit.map_source(ours), labels, 3, l2=l2)
    expected = head.logits(fit.map_target(theirs))
    spread = float(expected.std()) + 1e-3
    torch.testing.assert_close(answers(run, target), expected, atol=2e-3 * spread, rtol=2e-3)
    lineage = read_bundle(run)[1].lineage
    assert lineage["options"] == {**METHODS[method].options, **options, **seed}
    assert lineage["target_labels"] == "not used"


@pytest.mark.parametrize("head", ["ncm", "knn"])
def test_align__heads(align: Callable[..., Path], small: Path, source: Path, target: Path, head: str) -> None:
    run = align(method="standardize", head=head)
    config, summary = read_bundle(run)[1], json.loads((run / "summary.json").read_text())
    (ours, labels), (theirs, _) = (kept_features(small, folder) for folder in (source, target))
    fit = METHODS["standardize"](ours, theirs)
    mapped, there = fit.map_source(ours), fit.map_target(theirs)
    choice = min(summary["tried"], key=lambda pair: pair[1])[0]
    if head == "knn":
        expected = fit_neighbours(mapped, labels, 3, k=int(choice)).logits(there)
        assert config.model["head"]["type"] == "neighbours"
        assert config.model["head"]["samples"] == 36
    else:
        expected = fit_class_means(mapped, labels, 3, sharpness=choice).logits(there)
        assert config.model["head"]["type"] == "linear"
    torch.testing.assert_close(answers(run, target), expected, atol=2e-3, rtol=2e-3)
    assert len(summary["tried"]) > 1
    assert "neighbours" in architecture_name(config.model) or head == "ncm"


def test_align__a_head_of_neighbours_is_aligned_again(
    align: Callable[..., Path], target: Path, source: Path
) -> None:
    first = align(method="standardize", head="knn")
    second = align(bundle=first, method="coral")
    direct = align(bundle=align(method="standardize"), method="coral")
    torch.testing.assert_close(answers(second, target), answers(direct, target), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["kmm", "density"])
def test_align__weights_are_written_and_used(
    align: Callable[..., Path], small: Path, source: Path, target: Path, name: str
) -> None:
    run = align(method="none", weights=name)
    table = pq.read_table(run / "weights.parquet")
    assert table.column_names == ["id", "weight"]
    domain = open_domain(source)
    assert table["id"].to_pylist() == [domain.id(index) for index in range(36)]
    (ours, labels), (theirs, _) = (kept_features(small, folder) for folder in (source, target))
    weights = WEIGHTS[name](ours, theirs)
    np.testing.assert_allclose(table["weight"].to_numpy(), weights.numpy(), rtol=1e-5, atol=1e-6)
    head = fit_logistic(ours, labels, 3, l2=read_bundle(run)[1].lineage["l2"], weights=weights)
    expected = head.logits(theirs)
    torch.testing.assert_close(answers(run, target), expected, atol=2e-3 * float(expected.std()), rtol=2e-3)


@pytest.mark.parametrize("method", ["none", "jda"])
def test_align__a_few_target_labels_are_used_and_said(
    align: Callable[..., Path], small: Path, source: Path, target: Path, method: str
) -> None:
    run = align(method=method, target_labels=2)
    assert read_bundle(run)[1].lineage["target_labels"] == "6 of 24 used"
    (ours, labels), (theirs, truth) = (kept_features(small, folder) for folder in (source, target))
    told = torch.from_numpy(choose_told(open_domain(target).training_split(), NAMES, 2, 0))
    assert torch.bincount(truth[told]).tolist() == [2, 2, 2]
    known = torch.where(told, truth, -1)
    fit = METHODS[method](ours, theirs, *((labels, known) if method == "jda" else ()))
    mapped, there = fit.map_source(ours), fit.map_target(theirs)
    weights = torch.cat([torch.ones(36), torch.full((6,), 6.0)])  # together as much as the source
    head = fit_logistic(
        torch.cat([mapped, there[told]]),
        torch.cat([labels, truth[told]]),
        3,
        l2=read_bundle(run)[1].lineage["l2"],
        weights=weights,
    )
    expected = head.logits(there)
    torch.testing.assert_close(answers(run, target), expected, atol=2e-3 * float(expected.std()), rtol=2e-3)


def test_align__target_labels_change_nothing_where_they_are_not_asked_for(
    align: Callable[..., Path], target: Path, tmp_path: Path
) -> None:
    """The same images under other labels give the same model, whatever the method reads."""
    turned = tmp_path / "turned"
    names = {"a1": "a2", "a2": "a10", "a10": "a1"}
    for file in sorted((target / "train").rglob("*.png")):
        place = turned / "train" / names[file.parent.name] / f"{file.parent.name}-{file.name}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
    for options in ({"method": "jda", "dims": 3}, {"method": "none", "weights": "kmm"}):
        first, second = align(**options), align(target=turned, **options)
        found, expected = (load_file(run / "bundle" / "model.safetensors") for run in (second, first))
        for name, tensor in expected.items():
            np.testing.assert_allclose(found[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def test_align__keeps_no_more_samples_than_it_is_told(
    align: Callable[..., Path], small: Path, source: Path, target: Path
) -> None:
    """Moments are of all images; the head, and what it stores, of those that are kept."""
    run = align(method="standardize", head="knn", samples=10)
    kept = choose_samples(open_domain(source), 10, 0)
    assert kept.sum() == 10
    (ours, _), (theirs, _) = (kept_features(small, folder) for folder in (source, target))
    stored = METHODS["standardize"](ours, theirs).map_source(ours)[torch.from_numpy(kept)]
    weight = load_file(run / "bundle" / "model.safetensors")["head.weight"]
    expected = torch.nn.functional.normalize(stored, dim=1).numpy()
    np.testing.assert_allclose(weight, expected, atol=1e-5)


def test_choose_samples__does_not_look_at_labels_or_positions(target: Path) -> None:
    domain = open_domain(target).training_split()
    order = np.random.default_rng(0).permutation(len(domain))
    chosen = choose_samples(domain, 9, 5)
    other = replace(domain.subset(order), labels=np.full(len(domain), -1))
    assert {domain.id(i) for i in np.flatnonzero(chosen)} == {
        other.id(i) for i in np.flatnonzero(choose_samples(other, 9, 5))
    }
    assert not np.array_equal(chosen, choose_samples(domain, 9, 6))


def test_align__options_that_a_method_lacks_are_refused(align: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"dims=3: method=coral has no such option"):
        align(method="coral", dims=3)
    with pytest.raises(RecipeError, match="takes no weights"):
        align(head="knn", weights="kmm")
    with pytest.raises(DomainError, match="there can be 1 to"):
        align(method="subspace", dims=64)


def test_align__labels_that_are_not_there_cannot_be_used(
    align: Callable[..., Path], target: Path, tmp_path: Path
) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, file in enumerate(sorted((target / "train").rglob("*.png"))):
        (loose / f"{number}.png").write_bytes(file.read_bytes())
    with pytest.raises(DomainError, match="target_labels=1 asks for labels"):
        align(target=loose, target_labels=1)


def test_align__classes_are_those_of_the_source(tmp_path: Path, source: Path, target: Path) -> None:
    other = make_bundle(tmp_path / "other", ("x", "y"), name="squeezenet1_1")  # another task altogether
    outcome = api.align(
        bundle=other, source=source, target=target, method="standardize", out=tmp_path / "run", workers=0
    )
    assert read_bundle(tmp_path / "run")[1].classes == NAMES
    assert outcome.values["before"] is None
    assert outcome.values["accuracy"] is not None


# -- refusals ----------------------------------------------------------------------------------------------


def test_align__second_bundle_is_refused(bundle: Path, source: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="heterogeneous"):
        api.align(bundle=bundle, target_bundle=bundle, source=source, target=target, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_align__wrong_method_names_the_close_ones(
    bundle: Path, source: Path, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"method=corel: unknown\. Did you mean: coral\?"):
        api.align(bundle=bundle, source=source, target=target, method="corel", out=tmp_path / "run")
    with pytest.raises(RecipeError, match="cannot be imported"):
        api.align(bundle=bundle, source=source, target=target, method="nowhere:f", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_align__source_without_labels_is_refused(bundle: Path, target: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted(target.rglob("*.png"))[:4]):
        (flat / f"{number}.png").write_bytes(file.read_bytes())
    with pytest.raises(DomainError, match="no labels"):
        api.align(bundle=bundle, source=flat, target=target, out=tmp_path / "run", workers=0)
    assert not (tmp_path / "run" / "bundle").exists()


def test_align__not_a_bundle(source: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        api.align(bundle=source, source=source, target=target, out=tmp_path / "run")


def test_align__what_comes_after_the_head_is_noticed(source: Path, target: Path, tmp_path: Path) -> None:
    name = "tests.support_models:log_softmax_net"
    description = describe_network(name, 3)
    model = build_network(description, trust_code=True)
    save_bundle(tmp_path / "bundle", model, BundleConfig(description, NAMES, SMALL))
    with pytest.raises(ModelError, match="after its last linear layer"):
        api.align(
            bundle=tmp_path / "bundle",
            source=source,
            target=target,
            out=tmp_path / "run",
            workers=0,
            trust_code=True,
        )
    assert not (tmp_path / "run" / "bundle").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_align__method_of_ones_own(bundle: Path, source: Path, target: Path, tmp_path: Path) -> None:
    method = "tldist.align.methods:coral"
    api.align(bundle=bundle, source=source, target=target, method=method, out=tmp_path / "run", workers=0)
    assert read_bundle(tmp_path / "run")[1].lineage["method"] == method
