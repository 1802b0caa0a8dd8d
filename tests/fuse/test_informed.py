"""`tldist fuse` with the methods that look at data or at units first, from outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.nets import plain_cnn
from tests.support import make_images
from tests.support_models import SMALL, lively_model
from tests.support_processes import run_ranks
from tldist import api
from tldist.bundle import BundleConfig, read_bundle
from tldist.data.loader import load_batches
from tldist.distributed import Team
from tldist.domain import Domain, open_domain
from tldist.errors import ModelError, RecipeError
from tldist.fuse.rebasin.spec import permute
from tldist.fuse.rebasin.trace import find_groups
from tldist.fuse.statistics.fisher import fisher_information, normalised
from tldist.fuse.statistics.gram import gram_matrices
from tldist.fuse.statistics.repair import channel_statistics
from tldist.fuse.statistics.walk import Walk
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.zoo import describe_network
from tldist.training.ledger import Ledger

NAMES = ("a", "b", "c")
NET = "tests.nets:plain_cnn"
ALONE = Team(0, 1, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for seed, split in enumerate(("train", "val")):
        make_images(root / split, dict.fromkeys(NAMES, 12), seed=seed)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """A base and two fine-tunes of it, their classes in other orders."""
    root = tmp_path_factory.mktemp("models")
    model = lively_model(NET, 3)
    save_bundle(root / "base", model, BundleConfig(describe_network(NET, 3), NAMES, SMALL))
    found = {"base": root / "base"}
    for seed in range(2):
        out = root / f"m{seed}"
        api.finetune(
            data=data,
            model=root / "base",
            out=out,
            epochs=4,
            train="all",
            batch_size=12,
            seed=seed,
            optimizer={"lr": 3e-3},
            trust_code=True,
            workers=0,
        )
        model, config = load_bundle(out, trust_code=True)
        order = [[2, 0, 1], [0, 1, 2]][seed]
        head = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
        head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
        classes = tuple(config.classes[row] for row in order)
        save_bundle(root / f"t{seed}", model, BundleConfig(config.model, classes, SMALL))
        found[f"t{seed}"] = root / f"t{seed}"
    return found


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(read_bundle(path)[0] / "model.safetensors")


def fuse(models: dict[str, Path], data: Path, out: Path, method: str, **more: object) -> dict[str, object]:
    api.fuse(
        bundles=[models["t0"], models["t1"]],
        method=method,
        data=data,
        out=out,
        batch_size=12,
        trust_code=True,
        workers=0,
        **more,
    )
    summary: dict[str, object] = json.loads((out / "summary.json").read_text())
    return summary


def train_split(data: Path) -> Domain:
    return open_domain(data).training_split()


def in_first_order(models: dict[str, Path], tensors: list[dict[str, torch.Tensor]], head: str) -> None:
    """Put the rows of the second model's head-shaped tensors into the first one's order."""
    first, second = (read_bundle(models[name])[1].classes for name in ("t0", "t1"))
    for name in (f"{head}.weight", f"{head}.bias"):
        tensors[1][name] = tensors[1][name][[second.index(label) for label in first]]


def head_name(models: dict[str, Path]) -> str:
    model, _ = load_bundle(models["t0"], trust_code=True)
    return [path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)][-1]


def test_fisher__weighs_each_parameter_by_its_information(
    tmp_path: Path, models: dict[str, Path], data: Path
) -> None:
    fuse(models, data, tmp_path / "run", "fisher", weights=(1, 3))
    walk = Walk(1024, 12)
    fishers, parents = [], []
    for name in ("t0", "t1"):
        model, _ = load_bundle(models[name], trust_code=True)
        domain = train_split(data)
        found = fisher_information(model, SMALL, domain, ALONE, Ledger(domain, None), walk=walk)
        fishers.append(normalised(found))
        parents.append(weights_of(models[name]))
    head = head_name(models)
    in_first_order(models, fishers, head)
    in_first_order(models, parents, head)
    merged = weights_of(tmp_path / "run")
    for name in fishers[0]:
        first, second = fishers[0][name].numpy(), 3 * fishers[1][name].numpy()
        theta = [parent[name].double().numpy() for parent in parents]
        plain = (theta[0] + 3 * theta[1]) / 4
        total = first + second
        expected = np.where(
            total > 0, (first * theta[0] + second * theta[1]) / np.maximum(total, 1e-300), plain
        )
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=2e-4, atol=2e-6, err_msg=name)


def test_regmean__is_least_squares_of_each_layer(tmp_path: Path, models: dict[str, Path], data: Path) -> None:
    fuse(models, data, tmp_path / "run", "regmean", reduce=1.0)
    walk = Walk(1024, 12)
    grams, parents = [], []
    for name in ("t0", "t1"):
        model, _ = load_bundle(models[name], trust_code=True)
        domain = train_split(data)
        found = gram_matrices(model, SMALL, domain, ALONE, Ledger(domain, None), walk=walk)
        grams.append(found.matrices)
        parents.append(weights_of(models[name]))
    in_first_order(models, parents, head_name(models))
    merged = weights_of(tmp_path / "run")
    for name, gram in grams[0].items():
        if gram.dim() == 3:
            continue
        both = [gram.numpy(), grams[1][name].numpy()]
        flat = [parent[name].double().numpy().reshape(len(parent[name]), -1) for parent in parents]
        found = merged[name].double().numpy().reshape(flat[0].shape)
        # Where the gradient of the sum of both layers' squared errors vanishes.
        gradient = sum((found - own) @ g for own, g in zip(flat, both))
        scale = sum(np.abs(own @ g).max() for own, g in zip(flat, both))
        assert np.abs(gradient).max() < 2e-3 * scale, name


def test_adamerging__lowers_the_entropy_and_says_its_coefficients(
    tmp_path: Path, models: dict[str, Path], data: Path
) -> None:
    summary = fuse(
        models,
        data,
        tmp_path / "run",
        "adamerging",
        base=models["base"],
        adamerging={"steps": 30, "lr": 0.02},
    )
    entropy, coefficients = summary["entropy"], summary["coefficients"]
    assert isinstance(entropy, dict)
    assert isinstance(coefficients, dict)
    assert entropy["after"] < entropy["before"]
    fuse(models, data, tmp_path / "start", "task_arithmetic", base=models["base"], scale=0.3)
    domain = train_split(data)
    batch = next(iter(load_batches(domain, [np.arange(len(domain))], SMALL)))
    with torch.no_grad():
        start = load_bundle(tmp_path / "start", trust_code=True)[0](input_tensor(batch.images, SMALL))
    expected = torch.distributions.Categorical(logits=start.double()).entropy().mean()
    assert entropy["before"] == pytest.approx(float(expected), rel=1e-4)  # a step sees all of the few images
    parents = [weights_of(models[name]) for name in ("t0", "t1")]
    base = weights_of(models["base"])
    in_first_order(models, parents, head_name(models))
    order = [NAMES.index(name) for name in read_bundle(models["t0"])[1].classes]
    merged = weights_of(tmp_path / "run")
    for name, pair in coefficients.items():
        origin = base[name][order] if name.startswith(head_name(models)) else base[name]
        expected = origin.double() + sum(
            c * (p[name].double() - origin.double()) for c, p in zip(pair, parents)
        )
        torch.testing.assert_close(merged[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("match", ["weights", "activations"])
def test_rebasin__of_a_model_and_its_permutation_is_the_model(
    tmp_path: Path, models: dict[str, Path], data: Path, match: str
) -> None:
    """A plain average of the two is something else."""
    model, config = load_bundle(models["t0"], trust_code=True)
    spec = find_groups(model, (SMALL.height, SMALL.width))
    rng = np.random.default_rng(1)
    order = {group.name: rng.permutation(group.size) for group in spec.groups}
    shuffled = permute(weights_of(models["t0"]), spec, order)
    other = plain_cnn(3)
    other.load_state_dict(shuffled)
    save_bundle(tmp_path / "other", other.eval(), config)
    given = {"t0": models["t0"], "t1": tmp_path / "other"}
    fuse(given, data, tmp_path / "run", "rebasin", match=match, statistics="pooled")
    expected = weights_of(models["t0"])
    for name, tensor in weights_of(tmp_path / "run").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)
    domain = train_split(data)
    batch = next(iter(load_batches(domain, [np.arange(len(domain))], SMALL)))
    inputs = input_tensor(batch.images, SMALL)
    api.fuse(
        bundles=list(given.values()), method="average", out=tmp_path / "plain", trust_code=True, workers=0
    )
    with torch.no_grad():
        plain = load_bundle(tmp_path / "plain", trust_code=True)[0](inputs)
        rebased = load_bundle(tmp_path / "run", trust_code=True)[0](inputs)
        wanted = model(inputs)
    assert (rebased - wanted).norm() < 1e-4 * wanted.norm()
    assert (plain - wanted).norm() > 0.1 * wanted.norm()


def _weights(models: dict[str, Path], data: Path, out: Path, method: str) -> dict[str, np.ndarray]:
    more = {"base": models["base"], "adamerging": {"steps": 5}} if method == "adamerging" else {}
    fuse(models, data, out, method, **more)
    return {name: tensor.numpy() for name, tensor in weights_of(out).items()}


@pytest.mark.parametrize("method", ["fisher", "regmean", "adamerging"])
def test_informed__two_processes_as_one(
    tmp_path: Path, models: dict[str, Path], data: Path, method: str
) -> None:
    (one,) = run_ranks(_weights, 1, models, data, tmp_path / "one", method)
    two, _ = run_ranks(_weights, 2, models, data, tmp_path / "two", method)
    for name, tensor in one.items():
        np.testing.assert_allclose(two[name], tensor, rtol=1e-4, atol=1e-5, err_msg=name)


def test_sources__each_model_is_looked_at_on_its_own_domain(
    tmp_path: Path, models: dict[str, Path], data: Path
) -> None:
    other = make_images(tmp_path / "other", dict.fromkeys(NAMES, 6), seed=7)
    target = fuse(models, data, tmp_path / "target", "fisher")
    own = fuse(models, data, tmp_path / "own", "fisher", sources=(str(data), str(other)))
    assert own["statistics_from"] != target["statistics_from"]
    first, second = weights_of(tmp_path / "target"), weights_of(tmp_path / "own")
    assert any(not torch.equal(first[name], tensor) for name, tensor in second.items())


def test_repair__gives_a_net_without_batchnorm_its_parents_statistics(tmp_path: Path, data: Path) -> None:
    bundles = []
    for seed in range(2):
        model = lively_model("squeezenet1_1", 3, seed=seed)
        save_bundle(
            tmp_path / f"m{seed}",
            model,
            BundleConfig(describe_network("squeezenet1_1", 3), NAMES, SMALL),
        )
        bundles.append(tmp_path / f"m{seed}")
    common = {"bundles": bundles, "method": "average", "data": data, "workers": 0}
    with pytest.raises(ModelError, match="refused: its features hardly differ between images"):
        api.fuse(statistics="pooled", out=tmp_path / "pooled", **common)
    assert not (tmp_path / "pooled" / "bundle").exists()
    api.fuse(statistics="repair", out=tmp_path / "repair", **common)
    domain = train_split(data)

    def statistics(path: Path) -> dict[str, torch.Tensor]:
        model, config = load_bundle(path)
        walk = Walk(1024, 64)
        return channel_statistics(model, config.preprocessing, domain, ALONE, Ledger(domain, None), walk=walk)

    first, second, found = (statistics(path) for path in (*bundles, tmp_path / "repair"))
    for name in found:
        torch.testing.assert_close(found[name], (first[name] + second[name]) / 2, rtol=1e-3, atol=1e-4)


# -- refusals ----------------------------------------------------------------------------------------------


def test_informed__say_what_they_need(tmp_path: Path, models: dict[str, Path], data: Path) -> None:
    common = {"bundles": [models["t0"], models["t1"]], "out": tmp_path / "run", "trust_code": True}
    for method in ("fisher", "regmean"):
        with pytest.raises(RecipeError, match="needs data="):
            api.fuse(method=method, **common)
        common["out"] = tmp_path / f"run-{method}"
    with pytest.raises(RecipeError, match="needs base="):
        api.fuse(method="adamerging", data=data, **common)
    common["out"] = tmp_path / "run3"
    with pytest.raises(RecipeError, match=r"match=activations needs data="):
        api.fuse(method="rebasin", match="activations", **common)
    with pytest.raises(RecipeError, match="sources: 1 for 2 bundles"):
        api.fuse(method="fisher", sources=(str(data),), **common)
