"""Ensembles: built by class name, stacked on labelled images, used by every command that takes a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, logsumexp
from torch import Tensor, nn

from tests.support import class_image, encode, make_splits
from tests.support_models import SMALL, lively_model, make_bundle
from tests.support_processes import run_ranks
from tldist import api, distributed
from tldist.bundle import BundleConfig
from tldist.cli import main
from tldist.domain import Domain, open_domain
from tldist.errors import BundleError, DomainError, ModelError
from tldist.fuse.outputs import build_ensemble
from tldist.fuse.stacking import collect_votes, fit_stacking
from tldist.models.composite import Ensemble
from tldist.models.heads import tapped
from tldist.models.listing import list_layers
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.recipe import LayersRecipe
from tldist.models.zoo import describe_network
from tldist.runtime.package import Package
from tldist.runtime.preprocess import Preprocessing, prepare

LARGER = Preprocessing(height=40, width=40, resize=40, mean=(0.5, 0.5, 0.5), std=(0.25, 0.3, 0.2))
TEAM = distributed.Team(0, 1, 1, torch.device("cpu"))


def parent(
    classes: tuple[str, ...], name: str = "tests.nets:plain_cnn", seed: int = 0, **config: Any
) -> tuple[nn.Module, BundleConfig]:
    """A classifier with random weights and what it is."""
    how = config.pop("preprocessing", SMALL)
    model = lively_model(name, len(classes), seed)
    return model, BundleConfig(describe_network(name, len(classes)), classes, how, **config)


class Constant(nn.Module):
    """Answers the same whatever it sees."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.head = nn.Linear(1, len(probabilities))
        nn.init.zeros_(self.head.weight)
        self.head.bias.data = torch.tensor(probabilities).log()

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((1, 2, 3))[:, None])


def constant(probabilities: list[float], classes: tuple[str, ...], task: Any = "multiclass") -> Any:
    """A parent that always gives these probabilities (odds, of the multilabel task)."""
    config = BundleConfig(describe_network("tests.nets:plain_cnn", len(classes)), classes, SMALL, task=task)
    return Constant(probabilities).eval(), config


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"one": 12, "two": 9, "three": 6}
    return make_splits(tmp_path_factory.mktemp("data"), counts, counts)


# -- building ------------------------------------------------------------------------------------------


def test_build__classes_are_the_first_ones_or_the_union() -> None:
    same = build_ensemble([parent(("b", "a", "10")), parent(("10", "b", "a"))])[1]
    assert same.classes == ("b", "a", "10")
    union = build_ensemble([parent(("b", "a", "10")), parent(("2", "b"))])[1]
    assert union.classes == ("2", "10", "a", "b")
    assert [member["rows"] for member in union.model["members"]] == [[-1, 2, 1, 0], [0, -1, -1, 1]]
    asked = build_ensemble([parent(("b", "a", "10")), parent(("2", "b"))], classes=["b", "2"])[1]
    assert asked.classes == ("b", "2")


def test_build__weights_count_among_those_that_know() -> None:
    ensemble, _ = build_ensemble([parent(("a", "b")), parent(("b", "c"))], "logits", weights=[3, 1])
    expected = torch.tensor([[1, 0.75, 0], [0, 0.25, 1]])
    torch.testing.assert_close(ensemble.shares, expected)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_build__probabilities_of_one_model_stay_its_own(combine: Any) -> None:
    model, config = parent(("a", "b", "c"), temperature=2.5)
    images = input_tensor(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), SMALL)
    with torch.no_grad():
        expected = (model(images) / 2.5).softmax(1)
        ensemble, made = build_ensemble([(model, config)], combine)
        found = (ensemble(images) / made.temperature).softmax(1)
    torch.testing.assert_close(found, expected)


def test_build__takes_the_largest_input_and_says_who_sees_something_else(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cropped = replace(SMALL, resize=46)
    parents = [parent(("a", "b"), preprocessing=how) for how in (SMALL, LARGER, cropped)]
    config = build_ensemble(parents)[1]
    assert config.preprocessing == LARGER
    said = " ".join(capsys.readouterr().err.split())
    assert "model 3 (tests.nets:plain_cnn) was made for 32x32 of a picture resized to 46" in said
    assert "model 1" not in said


@pytest.mark.parametrize(
    ("parents", "options", "words"),
    [
        ([("a", "b"), ()], {}, "model 2 .* has no classes"),
        ([("a", "b"), ("b", "c")], {"classes": ["a", "d"]}, "no model knows the class 'd'"),
        ([("a", "b"), ("b", "c")], {"classes": ["a", "a"]}, "occurs twice"),
        ([("a", "b"), ("b", "c")], {"weights": [1, 0]}, "weight 0 know the class 'c'"),
        ([("a", "b"), ("b", "c")], {"weights": [1]}, "expected 2 finite numbers"),
        ([("a", "b"), ("b", "c")], {"weights": [1, float("nan")]}, "expected 2 finite numbers"),
        ([("a", "b"), ("b", "c")], {"weights": [1, -1]}, "not negative"),
    ],
)
def test_build__what_cannot_be_is_refused(parents: Any, options: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        build_ensemble([parent(classes) for classes in parents], **options)


def test_build__tasks_do_not_mix() -> None:
    with pytest.raises(BundleError, match=r"model 2 .* is multilabel and model 1 .* is multiclass"):
        build_ensemble([parent(("a", "b")), parent(("a", "b"), task="multilabel")])


# -- stacking ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one")])
def test_stacking__finds_the_share_in_closed_form(tmp_path: Path, names: tuple[str, str]) -> None:
    folder = make_splits(tmp_path, {"one": 2, "two": 2}, {"one": 27, "two": 9})
    domain = open_domain(folder).split("val")
    # Of two opposite constants the mixture that fits best gives class "one" the share that it has, 27 / 36.
    e = 0.1
    parents = [constant([1 - e, e], ("one", "two")), constant([1 - e, e], ("two", "one"))]
    order = [parents[("one", "two").index(name)] for name in names]
    ensemble, config = build_ensemble(order, "stacking")
    found = fit_stacking(ensemble, config, domain, TEAM, prior=0)
    share = (27 / 36 - e) / (1 - 2 * e)
    expected = [share, 1 - share] if names[0] == "one" else [1 - share, share]
    np.testing.assert_allclose(found.weights.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found.loss, -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)), atol=1e-9)
    np.testing.assert_allclose(found.uniform_loss, np.log(2), atol=1e-6)
    np.testing.assert_allclose(ensemble.shares[:, 0].numpy(), expected, atol=1e-6)
    assert found.converged
    assert found.images == 36


def test_stacking__the_prior_is_so_many_images_for_each_member(tmp_path: Path) -> None:
    folder = make_splits(tmp_path, {"one": 2, "two": 2}, {"one": 27, "two": 9})
    parents = [constant([1 - 1e-9, 1e-9], ("one", "two")), constant([1 - 1e-9, 1e-9], ("two", "one"))]
    ensemble, config = build_ensemble(parents, "stacking")
    found = fit_stacking(ensemble, config, open_domain(folder).split("val"), TEAM, prior=4)
    np.testing.assert_allclose(found.weights.numpy(), [31 / 44, 13 / 44], atol=1e-6)


def tagged(folder: Path) -> Domain:
    """Ten images: eight of sun, four of sea."""
    random = np.random.default_rng(0)
    tags = [["sun", "sea"]] * 3 + [["sun"]] * 5 + [["sea"]] * 1 + [[]] * 1
    images = [{"bytes": encode(class_image(0, random)), "path": None} for _ in tags]
    pq.write_table(pa.table({"image": images, "label": tags}), folder / "tags.parquet")
    domain = open_domain(folder / "tags.parquet")
    assert domain.is_multilabel
    return domain


def test_stacking__multilabel_finds_the_share_in_closed_form(tmp_path: Path) -> None:
    # sun: 0.9 or 0.1; sea: the same in both; so only sun tells: w 0.9 + (1 - w) 0.1 = 0.8
    parents = [constant([odds, 1.0], ("sun", "sea"), "multilabel") for odds in (9.0, 1 / 9)]
    ensemble, config = build_ensemble(parents, "stacking")
    found = fit_stacking(ensemble, config, tagged(tmp_path), TEAM, prior=0)
    np.testing.assert_allclose(found.weights.numpy(), [7 / 8, 1 / 8], atol=1e-5)


@pytest.mark.parametrize("each", ["member", "class"])
def test_stacking__multilabel_counts_those_that_know_a_class(tmp_path: Path, each: Any) -> None:
    parents = [
        constant([9.0, 1e-3], ("sun", "sea"), "multilabel"),
        constant([2.0], ("sea",), "multilabel"),
        constant([0.2], ("sun",), "multilabel"),
    ]
    ensemble, config = build_ensemble(parents, "stacking")
    domain = tagged(tmp_path)
    found = fit_stacking(ensemble, config, domain, TEAM, each=each)
    with torch.no_grad():
        answer = ensemble(torch.zeros(1, 3, 32, 32)).double().expand(len(domain), -1)
    targets = torch.from_numpy(domain.labels_in(config.classes)).double()
    loss = float(nn.functional.binary_cross_entropy_with_logits(answer, targets))
    assert found.loss == pytest.approx(loss, abs=1e-6)
    assert found.loss < found.uniform_loss


PARTIAL = [("one", "two", "three"), ("three", "one"), ("two", "one", "four")]
FULL = [("one", "two", "three"), ("three", "one", "two"), ("two", "one", "three")]


@pytest.mark.parametrize("names", [FULL, PARTIAL])
@pytest.mark.parametrize("each", ["member", "class"])
@pytest.mark.parametrize("prior", [0.0, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_stacking__is_never_worse_than_equal_shares(
    data: Path, names: Any, each: Any, prior: float, seed: int
) -> None:
    domain = open_domain(data).split("val")
    parents = [parent(classes, seed=seed * 10 + n) for n, classes in enumerate(names)]
    for model, _ in parents:
        nn.init.normal_(model[-1].weight, std=3)
    ensemble, config = build_ensemble(parents, "stacking")
    before, after = _loss(ensemble, config, domain), None
    found = fit_stacking(ensemble, config, domain, TEAM, each=each, prior=prior)
    after = _loss(ensemble, config, domain)
    assert found.uniform_loss == pytest.approx(before, abs=1e-5)
    assert found.loss == pytest.approx(after, abs=1e-5)
    assert after < before - 1e-3
    known = ensemble.known
    torch.testing.assert_close(ensemble.shares.sum(0), torch.ones(len(config.classes)))
    assert (ensemble.shares[~known] == 0).all()


def _loss(ensemble: Ensemble, config: BundleConfig, domain: Any) -> float:
    """Mean cross-entropy of the ensemble's own answers."""
    images = torch.from_numpy(np.stack([prepare(domain.read(i), SMALL) for i in range(len(domain))]))
    labels = torch.from_numpy(domain.labels_in(config.classes))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(ensemble(input_tensor(images, SMALL)).double(), labels))


def test_stacking__is_the_optimum_by_scipy(data: Path) -> None:
    domain = open_domain(data).split("val")
    parents = [parent(("one", "two", "three"), seed=n) for n in range(2)]
    for model, _ in parents:
        nn.init.normal_(model[-1].weight, std=3)
    ensemble, config = build_ensemble(parents, "stacking")
    votes, labels = (part.numpy() for part in collect_votes(ensemble, config, domain, TEAM))
    logs = log_softmax(votes.astype(np.float64), 2)[np.arange(len(labels)), :, labels]

    def loss(w: float) -> float:
        prior = np.log(w) + np.log(1 - w)
        return float(-logsumexp(logs, axis=1, b=[w, 1 - w]).mean() - prior / len(labels))

    best = minimize_scalar(loss, bounds=(1e-9, 1 - 1e-9), method="bounded", options={"xatol": 1e-10})
    found = fit_stacking(ensemble, config, domain, TEAM)
    assert found.weights[0].item() == pytest.approx(best.x, abs=1e-5)


def test_stacking__cannot_be_fitted_without_labels_it_knows(data: Path, tmp_path: Path) -> None:
    ensemble, config = build_ensemble([parent(("one", "two")), parent(("two", "one"))], "stacking")
    with pytest.raises(DomainError, match="does not know its class 'three'"):
        fit_stacking(ensemble, config, open_domain(data), TEAM)
    ensemble.members[0].model[-1].bias.data[0] = float("nan")
    two = make_splits(tmp_path, {"one": 2, "two": 2}, {"one": 2, "two": 2})
    with pytest.raises(ModelError, match="not finite"):
        fit_stacking(ensemble, config, open_domain(two), TEAM)


def _stacked(folder: Path, bundles: list[Path], each: Any) -> tuple[np.ndarray, float, np.ndarray]:
    team = distributed.start()
    parents = [load_bundle(bundle, trust_code=True) for bundle in bundles]
    ensemble, config = build_ensemble(parents, "stacking")
    domain = open_domain(folder).split("val")
    found = fit_stacking(ensemble, config, domain, team, each=each, batch_size=4)
    return found.weights.numpy(), found.loss, ensemble.shares.numpy()


@pytest.mark.parametrize("each", ["member", "class"])
def test_stacking__any_number_of_processes_finds_the_same(data: Path, tmp_path: Path, each: Any) -> None:
    bundles = [
        make_bundle(tmp_path / str(n), classes, "tests.nets:plain_cnn", seed=n)
        for n, classes in enumerate(PARTIAL)
    ]
    (alone,) = run_ranks(_stacked, 1, data, bundles, each)
    both = run_ranks(_stacked, 2, data, bundles, each)
    for found in both:
        np.testing.assert_allclose(found[0], alone[0], atol=1e-5)
        assert found[1] == pytest.approx(alone[1], abs=1e-9)
    np.testing.assert_array_equal(both[0][2], both[1][2])


# -- the commands that take a model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def ensemble_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two architectures, two sizes, two normalisations, two temperatures, other classes."""
    parents = [
        parent(("three", "one", "two"), "mobilenet_v3_small", temperature=1.5),
        parent(("two", "three"), "resnet18", 1, temperature=0.8, preprocessing=LARGER),
    ]
    ensemble, config = build_ensemble(parents)
    folder = tmp_path_factory.mktemp("ensemble") / "bundle"
    save_bundle(folder, ensemble, config)
    return folder


@pytest.fixture(scope="module")
def package(ensemble_bundle: Path) -> Path:
    folder = ensemble_bundle.parent / "package"
    api.export(bundle=str(ensemble_bundle), out=folder, output="both", samples=4)
    return folder


@pytest.mark.parametrize("count", [1, 3])
def test_export__one_graph_answers_as_the_ensemble(ensemble_bundle: Path, package: Path, count: int) -> None:
    images = np.random.default_rng(count).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
    found = Package.open(package).run(images)
    model, config = load_bundle(ensemble_bundle)
    with torch.no_grad():
        logits = model(input_tensor(torch.from_numpy(images), config.preprocessing)).numpy()
    np.testing.assert_allclose(found["logits"], logits, atol=1e-3 * np.abs(logits).max())
    assert found["features"].shape == (count, 1024 + 512)
    assert Package.open(package).config.classes == ("one", "three", "two")


def test_parity__passes_and_can_fail(ensemble_bundle: Path, package: Path, tmp_path: Path) -> None:
    assert api.parity(models=[str(ensemble_bundle), str(package)]).passed
    model, config = load_bundle(ensemble_bundle)
    model.shares = model.shares.flip(0) * model.known
    model.shares = model.shares / model.shares.sum(0) * torch.tensor([[0.7], [1.0]])
    save_bundle(tmp_path / "other", model, config)
    assert not api.parity(models=[str(tmp_path / "other"), str(package)]).passed


def test_evaluate__bundle_and_package_are_equally_good(
    ensemble_bundle: Path, package: Path, data: Path
) -> None:
    one, other = (api.evaluate(model=str(m), data=str(data)).values for m in (ensemble_bundle, package))
    assert one["accuracy"] == other["accuracy"]
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_embed__gives_the_features_of_all_members(ensemble_bundle: Path, data: Path, tmp_path: Path) -> None:
    outcome = api.embed(model=str(ensemble_bundle), data=str(data), out=tmp_path / "vectors")
    assert outcome.values["dimensions"] == 1024 + 512
    table = pq.read_table(sorted((tmp_path / "vectors").glob("part-*.parquet"))[0]).to_pydict()
    model, config = load_bundle(ensemble_bundle)
    domain = open_domain(data)
    picture = torch.from_numpy(prepare(domain.read(3), config.preprocessing))[None]
    with torch.no_grad(), tapped(model) as features:
        model(input_tensor(picture, config.preprocessing))
        expected = features()[0].numpy()
    found = np.array(table["embedding"][table["id"].index(domain.id(3))])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())


def test_layers__lists_the_members(ensemble_bundle: Path) -> None:
    outcome = list_layers(LayersRecipe(model=str(ensemble_bundle)))
    model, _ = load_bundle(ensemble_bundle)
    assert outcome.values["parameters"] == sum(p.numel() for p in model.parameters())
    assert (outcome.values["features"], outcome.values["outputs"]) == (1536, 3)
    names = [block["name"] for block in outcome.values["blocks"]]
    assert names[0] == "members.0.model.features.0"
    assert names[-1] == "members.1.model.fc"
    assert "not fine-tuned as a whole" in outcome.text


@pytest.mark.parametrize("stage", ["finetune", "align"])
def test_ensemble__where_a_head_is_needed_says_what_to_do(
    ensemble_bundle: Path, data: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {
        "finetune": [f"model={ensemble_bundle}", f"data={data}"],
        "align": [str(ensemble_bundle), f"source={data}", f"target={data}"],
    }[stage]
    assert main([stage, *arguments, f"out={tmp_path / 'run'}"]) == 2
    assert "Distil it into one model" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
