"""Concatenations: the features of several models, one head fitted on the target, used by every command."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from torch import nn

from tests.nets import plain_cnn
from tests.support import make_images, make_splits
from tests.support_models import SMALL, lively_model
from tests.support_processes import run_ranks
from tldist import api, distributed
from tldist.bundle import BundleConfig
from tldist.domain import open_domain
from tldist.errors import DomainError, ModelError, RecipeError
from tldist.features.maps import principal
from tldist.features.moments import Moments
from tldist.fuse.concat import build_concat
from tldist.fuse.concat_head import Join
from tldist.fuse.outputs import build_ensemble
from tldist.models.heads import tapped
from tldist.models.listing import list_layers
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.recipe import LayersRecipe
from tldist.models.zoo import describe_network
from tldist.runtime.package import Package
from tldist.runtime.preprocess import Preprocessing, prepare

LARGER = Preprocessing(height=40, width=40, resize=40, mean=(0.5, 0.5, 0.5), std=(0.25, 0.3, 0.2))
TEAM = distributed.Team(0, 1, 1, torch.device("cpu"))
CLASSES = ("one", "three", "two")


def parents(seed: int = 0) -> list[tuple[nn.Module, BundleConfig]]:
    """Two architectures that know other classes and take other inputs."""
    torch.manual_seed(seed)
    own = BundleConfig(describe_network("tests.nets:plain_cnn", 4), ("a", "b", "c", "d"), SMALL)
    name = "mobilenet_v3_small"
    other = BundleConfig(describe_network(name, 2), ("x", "one"), LARGER)
    return [(plain_cnn(4).eval(), own), (lively_model(name, 2, seed), other)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    counts = {"one": 12, "two": 9, "three": 9}
    return make_splits(tmp_path_factory.mktemp("data"), counts, counts)


def features_of(models: list[tuple[nn.Module, BundleConfig]], folder: Path) -> np.ndarray:
    """What the heads read, each model with its own normalisation, in float64: (N, D)."""
    domain = open_domain(folder).split("train")
    pixels = torch.stack([torch.from_numpy(prepare(domain.read(i), LARGER)) for i in range(len(domain))])
    columns = []
    for model, config in models:
        how = config.preprocessing
        images = pixels.permute(0, 3, 1, 2).double() / 255
        if how.height != 40:
            size = (how.height, how.width)
            images = nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (how.mean, how.std))
        wide = copy.deepcopy(model).double()
        with torch.no_grad(), tapped(wide) as seen:
            wide((images - mean) / std)
            columns.append(seen().numpy())
    return np.concatenate(columns, 1)


def standardised(values: np.ndarray, widths: tuple[int, ...], ridge: float) -> np.ndarray:
    parts = []
    for part in np.split(values, np.cumsum(widths)[:-1], 1):
        variance = part.var(0, ddof=1)
        parts.append((part - part.mean(0)) / np.sqrt(variance + ridge * variance.mean()))
    return np.concatenate(parts, 1)


@pytest.mark.parametrize("projection", [None, 6])
@pytest.mark.parametrize("ridge", [0.01, 0.5])
def test_concat__is_scikit_learns_pipeline(data: Path, projection: int | None, ridge: float) -> None:
    models = parents()
    raw = features_of(models, data)
    values = standardised(raw, (64, 1024), ridge)
    if projection:
        values = PCA(projection, svd_solver="full").fit_transform(values)
    domain = open_domain(data)
    labels = domain.split("train").labels_in(CLASSES)
    scale = np.sqrt(values.var())
    reference = LogisticRegression(C=1 / (0.1 * len(values)), tol=1e-10, max_iter=100_000)
    reference.fit(values / scale, labels)

    options = Join(projection=projection, ridge=ridge, grid=(0.1,), batch_size=7)
    concat, config, joined = build_concat(models, domain, TEAM, options)
    assert config.classes == CLASSES
    assert config.preprocessing == LARGER
    assert joined.widths == (64, 1024)
    train = domain.split("train")
    pixels = torch.stack([torch.from_numpy(prepare(train.read(i), LARGER)) for i in range(len(train))])
    with torch.no_grad():
        found = concat(input_tensor(pixels, LARGER)).double().softmax(1).numpy()
    np.testing.assert_allclose(found, reference.predict_proba(values / scale), atol=2e-3)
    assert [part["type"] for part in config.model["transforms"]] == (["affine"] if projection else [])


def test_concat__learns_what_the_target_shows(data: Path) -> None:
    concat, config, joined = build_concat(parents(), open_domain(data), TEAM)
    folder = data.parent / "learned"
    save_bundle(folder, concat, config)
    found = api.evaluate(model=str(folder), data=str(data), trust_code=True).values
    assert found["accuracy"] > 0.6  # 0.4 by guessing; the backbones are random
    assert joined.sweep.head.l2 in (1.0, 1e-1, 1e-2, 1e-3, 1e-4)


def test_concat__each_backbone_sees_each_image_once(data: Path) -> None:
    models, seen = parents(), [0, 0]
    for place, (model, _) in enumerate(models):
        model.register_forward_hook(
            lambda _m, inputs, _o, place=place: seen.__setitem__(place, seen[place] + len(inputs[0]))
        )
    build_concat(models, open_domain(data), TEAM, Join(projection=4))
    probes = 2 * 2  # noise, with the head and without
    assert seen == [30 + probes, 30 + probes]


@pytest.mark.parametrize(("count", "width", "kept"), [(50, 6, 6), (50, 6, 2), (5, 9, 3)])
def test_principal__is_scikit_learns_pca(count: int, width: int, kept: int) -> None:
    random = np.random.default_rng(count + kept)
    values = random.normal(size=(count, width)) @ random.normal(size=(width, width)) + 3
    affine = principal(Moments.from_batch(values), kept)
    found = (torch.from_numpy(values) @ affine.weight.T + affine.bias).numpy()
    expected = PCA(kept, svd_solver="full").fit_transform(values)
    signs = np.sign((found * expected).sum(0))
    np.testing.assert_allclose(found, expected * signs, atol=1e-8)
    largest = affine.weight.numpy()[np.arange(kept), np.abs(affine.weight.numpy()).argmax(1)]
    assert (largest > 0).all()


def test_concat__what_cannot_be_is_refused(data: Path, tmp_path: Path) -> None:
    domain = open_domain(data)
    for projection in (0, 64 + 1024 + 1):
        with pytest.raises(RecipeError, match="1088 features together"):
            build_concat(parents(), domain, TEAM, Join(projection=projection))
    ensemble = build_ensemble(parents())
    with pytest.raises(ModelError, match=r"model 2 .* is an ensemble"):
        build_concat([parents()[0], ensemble], domain, TEAM)
    with pytest.raises(DomainError, match="single image"):
        build_concat(parents(), open_domain(make_images(tmp_path / "few", {"a": 1, "b": 1})), TEAM)
    with pytest.raises(DomainError, match="single class"):
        build_concat(parents(), open_domain(make_images(tmp_path / "one", {"a": 5})), TEAM)


def test_concat__a_model_that_does_more_after_its_head_is_refused(data: Path) -> None:
    class Twice(nn.Module):
        """Reads its head's answer again."""

        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Flatten(), nn.Linear(3 * 32 * 32, 4)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.head(self.body(images)) * 2
            return answer

    config = parents()[0][1]
    with pytest.raises(ModelError, match=r"model 1 .* after its last linear layer"):
        build_concat([(Twice().eval(), config)], open_domain(data), TEAM)


def _built(folder: Path, projection: int | None) -> tuple[dict[str, Any], list[np.ndarray], float]:
    team = distributed.start()
    options = Join(projection=projection, batch_size=4)
    concat, config, joined = build_concat(parents(), open_domain(folder), team, options)
    fitted = [concat.head.weight, concat.head.bias, *(t.weight for t in concat.transforms)]
    return config.model, [tensor.detach().numpy() for tensor in fitted], joined.sweep.held_out_loss


@pytest.mark.parametrize("projection", [None, 5])
def test_concat__any_number_of_processes_builds_the_same(data: Path, projection: int | None) -> None:
    (alone,), both = run_ranks(_built, 1, data, projection), run_ranks(_built, 2, data, projection)
    for found in both:
        assert found[0] == alone[0]
        assert found[2] == alone[2]
        for one, other in zip(found[1], alone[1]):
            np.testing.assert_array_equal(one, other)


# -- the commands that take a model --------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(data: Path) -> Path:
    # With weights of a net that is not a person's own code: what follows needs no trust_code.
    models = [
        (lively_model(name, 2, seed), BundleConfig(describe_network(name, 2), ("a", "b"), how))
        for seed, (name, how) in enumerate([("resnet18", SMALL), ("mobilenet_v3_small", LARGER)])
    ]
    concat, config, _ = build_concat(models, open_domain(data), TEAM, Join(projection=8))
    save_bundle(data.parent / "concat" / "bundle", concat, config)
    return data.parent / "concat" / "bundle"


def test_export__one_graph_answers_as_the_concat(bundle: Path, tmp_path: Path) -> None:
    api.export(bundle=str(bundle), out=tmp_path / "package", output="both", samples=4)
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    model, config = load_bundle(bundle)
    package = Package.open(tmp_path / "package")
    with torch.no_grad():
        logits = model(input_tensor(torch.from_numpy(images), config.preprocessing)).numpy()
    for count in (1, 3):
        found = package.run(images[:count])
        np.testing.assert_allclose(found["logits"], logits[:count], atol=1e-3 * np.abs(logits).max())
        assert found["features"].shape == (count, 8)
    assert api.parity(models=[str(bundle), str(tmp_path / "package")]).passed
    assert api.parity(models=[str(tmp_path / "package")]).passed


def test_finetune__of_the_head_alone_computes_the_members_once(
    bundle: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = api.finetune(
        model=str(bundle), data=str(data), out=tmp_path / "run", train="head", epochs=3, image_size=36,
        augment={"crop": None, "flip": False}, cache={"folder": tmp_path / "cache"},
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "resnet18 + mobilenet_v3_small -> affine -> linear" in said
    before, after = load_bundle(bundle)[0].state_dict(), load_bundle(tmp_path / "run")[0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"head.weight", "head.bias"}
    assert load_bundle(tmp_path / "run")[1].preprocessing.height == 36
    assert outcome.values["accuracy"] is not None
    assert list((tmp_path / "cache").iterdir()), "the frozen members were not computed once"


def test_embed_layers_and_align__take_a_concat(bundle: Path, data: Path, tmp_path: Path) -> None:
    assert api.embed(model=str(bundle), data=str(data), out=tmp_path / "v").values["dimensions"] == 8
    names = [block["name"] for block in list_layers(LayersRecipe(model=str(bundle))).values["blocks"]]
    assert names == ["members.0", "members.1", "head"]
    api.align(bundle=str(bundle), source=str(data), target=str(data), out=tmp_path / "a", method="coral")
    aligned, config = load_bundle(tmp_path / "a")
    assert config.model["backbone"]["type"] == "concat"
    assert sum(p.numel() for p in aligned.parameters()) > 0
