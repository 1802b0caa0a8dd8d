"""`tldist fuse` from outside: what its bundle holds, what it measures, what it refuses."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from tests.support import make_images
from tests.support_models import SMALL, lively_model, make_bundle
from tests.support_processes import run_ranks
from tldist import api
from tldist.bundle import BundleConfig, read_bundle
from tldist.data.loader import load_batches
from tldist.domain import open_domain
from tldist.errors import BundleError, DomainError, ModelError, RecipeError
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.zoo import describe_network
from tldist.training.batchnorm import even_batches

NAMES = ("1", "2", "12")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_images(root / "train", {"1": 9, "2": 9, "12": 8}, seed=1)
    make_images(root / "val", {"12": 4, "2": 4, "1": 4}, seed=2)
    return root


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [make_bundle(root / f"m{seed}", NAMES, seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Models without BatchNorm."""
    root = tmp_path_factory.mktemp("plain")
    return [make_bundle(root / f"m{seed}", NAMES, name="squeezenet1_1", seed=seed) for seed in range(3)]


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(read_bundle(run)[0] / "model.safetensors")


def learned(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in tensors.items() if "running_" not in name and t.is_floating_point()}


def test_fuse__average_of_equal_models_is_the_model(tmp_path: Path, bundles: list[Path]) -> None:
    api.fuse(bundles=[bundles[0]] * 3, method="average", out=tmp_path / "run")
    expected = weights_of(bundles[0])
    for name, tensor in weights_of(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name]), name
    assert read_bundle(tmp_path / "run")[1].identity == read_bundle(bundles[0])[1].identity


@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 5.0), (0.0, 1.0, 0.0)])
def test_fuse__average_equals_float64(
    tmp_path: Path, bundles: list[Path], weights: tuple[float, ...] | None
) -> None:
    api.fuse(bundles=bundles, method="average", out=tmp_path / "run", weights=weights)
    parents = [weights_of(bundle) for bundle in bundles]
    shares = np.array(weights or (1, 1, 1)) / sum(weights or (1, 1, 1))
    found = weights_of(tmp_path / "run")
    for name in learned(found):
        expected = np.tensordot(shares, np.stack([p[name].double().numpy() for p in parents]), axes=1)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-6, atol=1e-7, err_msg=name)
    for prefix in ("bn1", "layer4.1.bn2"):
        means = np.stack([p[f"{prefix}.running_mean"].double().numpy() for p in parents])
        variances = np.stack([p[f"{prefix}.running_var"].double().numpy() for p in parents])
        mean = shares @ means
        pooled = shares @ (variances + means**2) - mean**2
        np.testing.assert_allclose(found[f"{prefix}.running_mean"], mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[f"{prefix}.running_var"], pooled, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("alpha", "same_as"), [(0.0, 0), (1.0, 1)])
def test_fuse__wise_ft_at_its_ends_is_one_of_the_two(
    tmp_path: Path, bundles: list[Path], alpha: float, same_as: int
) -> None:
    base, tuned = bundles[:2]
    api.fuse(bundles=[tuned], base=base, method="wise_ft", alpha=alpha, out=tmp_path / "run")
    expected = weights_of((base, tuned)[same_as])
    for name, tensor in weights_of(tmp_path / "run").items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, expected[name]), name


def test_fuse__wise_ft_goes_from_the_base_to_the_average(tmp_path: Path, plain: list[Path]) -> None:
    api.fuse(bundles=plain[1:], base=plain[0], method="wise_ft", alpha=0.25, out=tmp_path / "run")
    base, first, second = (weights_of(bundle) for bundle in plain)
    for name, tensor in weights_of(tmp_path / "run").items():
        expected = 0.75 * base[name].double() + 0.125 * (first[name].double() + second[name].double())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_fuse__another_class_order_is_put_right_by_name(tmp_path: Path, plain: list[Path]) -> None:
    """A parent whose rows are permuted together with its class names is the same model."""
    model, config = load_bundle(plain[1])
    order = [2, 0, 1]
    head = model.classifier[1]
    permuted = copy.deepcopy(model)
    permuted.classifier[1].weight.data, permuted.classifier[1].bias.data = (
        head.weight[order],
        head.bias[order],
    )
    classes = tuple(config.classes[row] for row in order)
    save_bundle(tmp_path / "permuted", permuted, replace(config, classes=classes))
    api.fuse(bundles=[plain[0], tmp_path / "permuted"], method="average", out=tmp_path / "a")
    api.fuse(bundles=[plain[0], plain[1]], method="average", out=tmp_path / "b")
    api.fuse(bundles=[tmp_path / "permuted", plain[0]], method="average", out=tmp_path / "c")
    api.fuse(bundles=[plain[0]], base=tmp_path / "permuted", method="wise_ft", out=tmp_path / "d")
    assert read_bundle(tmp_path / "a")[1].classes == NAMES
    assert read_bundle(tmp_path / "c")[1].classes == classes
    a, b, c, d = (weights_of(tmp_path / name) for name in "abcd")
    assert read_bundle(tmp_path / "d")[1].classes == NAMES
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.equal(a[name], d[name]) for name in a)  # halfway from one to the other
    torch.testing.assert_close(c["classifier.1.weight"], a["classifier.1.weight"][order])
    torch.testing.assert_close(c["classifier.1.bias"], a["classifier.1.bias"][order])


def test_fuse__statistics_are_those_of_the_merged_weights(
    tmp_path: Path, bundles: list[Path], data: Path
) -> None:
    """By PyTorch's own update of the averaged model on the same batches."""
    outcome = api.fuse(
        bundles=bundles, method="average", data=data, out=tmp_path / "run", batch_size=8, seed=5, workers=0
    )
    assert outcome.values["batchnorm_batches"] == 4
    reference = lively_model("resnet18", 3)
    parents = [weights_of(bundle) for bundle in bundles]
    for name, parameter in reference.named_parameters():
        parameter.data = torch.stack([parent[name].double() for parent in parents]).mean(0).float()
    domain = open_domain(data).split("train")
    plans = even_batches(len(domain), 8, seed=5)
    update_bn([input_tensor(batch.images, SMALL) for batch in load_batches(domain, plans, SMALL)], reference)
    found = weights_of(tmp_path / "run")
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_fuse__every_parent_and_the_result_are_measured(
    tmp_path: Path, bundles: list[Path], data: Path
) -> None:
    outcome = api.fuse(bundles=bundles[:2], method="average", data=data, out=tmp_path / "run", workers=0)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["before"]) == [str(bundle) for bundle in bundles[:2]]
    for bundle in bundles[:2]:
        alone = api.evaluate(model=bundle, data=data, workers=0).values
        assert summary["before"][str(bundle)]["accuracy"] == alone["accuracy"]
        assert summary["before"][str(bundle)]["loss"] == pytest.approx(alone["loss"], abs=1e-6)
    result = api.evaluate(model=tmp_path / "run", data=data, workers=0).values
    assert summary["after"]["loss"] == pytest.approx(result["loss"], abs=1e-6)
    assert summary["after"]["count"] == 12  # the val split alone
    assert summary["merged"]["loss"] != summary["after"]["loss"]
    assert "re-estimated" in outcome.text
    lineage = read_bundle(tmp_path / "run")[1].lineage
    assert [parent["identity"] for parent in lineage["parents"]] == [
        read_bundle(bundle)[1].identity for bundle in bundles[:2]
    ]
    assert [parent["share"] for parent in lineage["parents"]] == [0.5, 0.5]
    assert lineage["method"] == "average"


def test_fuse__unlabelled_data_re_estimates_all_the_same(
    tmp_path: Path, bundles: list[Path], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for number, file in enumerate(sorted((data / "train").rglob("*.png"))):
        (flat / f"{number:02}.png").write_bytes(file.read_bytes())
    outcome = api.fuse(bundles=bundles[:2], method="average", data=flat, out=tmp_path / "run", workers=0)
    assert outcome.values["batchnorm_batches"] == 1
    assert outcome.values["accuracy"] is None
    assert "nothing is measured" in capsys.readouterr().err


def test_fuse__says_what_is_not_used(
    tmp_path: Path, plain: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    api.fuse(bundles=plain[:2], base=plain[2], alpha=0.3, method="average", out=tmp_path / "run")
    said = capsys.readouterr().err
    assert "base= is not used by method=average" in said
    assert "alpha= is not used by method=average" in said
    assert "BatchNorm" not in said


def test_fuse__says_that_batchnorm_wants_data(
    tmp_path: Path, bundles: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    api.fuse(bundles=bundles[:2], method="average", out=tmp_path / "run")
    assert "Give data= images of the target" in capsys.readouterr().err


def _fuse(bundles: list[Path], data: Path, out: Path) -> tuple[float, float]:
    values = api.fuse(bundles=bundles, method="average", data=data, out=out, batch_size=6, workers=0).values
    return values["merged"], values["accuracy"]


def test_fuse__two_processes_give_the_model_of_one(tmp_path: Path, bundles: list[Path], data: Path) -> None:
    one = run_ranks(_fuse, 1, bundles, data, tmp_path / "one")
    two = run_ranks(_fuse, 2, bundles, data, tmp_path / "two")
    assert two == one * 2
    first, second = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_fuse__a_chain_is_merged_too(tmp_path: Path, plain: list[Path], data: Path) -> None:
    for number, bundle in enumerate(plain[:2]):
        api.align(
            bundle=bundle,
            source=data,
            target=data,
            method="standardize",
            out=tmp_path / f"c{number}",
            workers=0,
        )
    chains = [tmp_path / "c0", tmp_path / "c1"]
    api.fuse(bundles=chains, method="average", out=tmp_path / "run")
    first, second, merged = (weights_of(path) for path in (*chains, tmp_path / "run"))
    for name in ("transforms.0.weight", "head.weight", "backbone.features.0.weight"):
        torch.testing.assert_close(merged[name], (first[name] + second[name]) / 2, rtol=1e-5, atol=1e-6)


def test_fuse__again_says_that_it_is_finished(tmp_path: Path, plain: list[Path]) -> None:
    api.fuse(bundles=plain[:2], method="average", out=tmp_path / "run")
    assert "finished already" in api.fuse(bundles=plain[:2], method="average", out=tmp_path / "run").text
    with pytest.raises(RecipeError, match="other models"):
        api.fuse(bundles=plain, method="average", out=tmp_path / "run")


# -- refusals ----------------------------------------------------------------------------------------------


def test_fuse__wrong_method_and_missing_base(tmp_path: Path, plain: list[Path]) -> None:
    with pytest.raises(RecipeError, match=r"method=averag: unknown\. Did you mean: average"):
        api.fuse(bundles=plain, method="averag", out=tmp_path / "run")
    with pytest.raises(RecipeError, match="needs base="):
        api.fuse(bundles=plain, method="wise_ft", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0), (0.0, 0.0)])
def test_fuse__impossible_weights(tmp_path: Path, plain: list[Path], weights: tuple[float, ...]) -> None:
    with pytest.raises(RecipeError, match="weights"):
        api.fuse(bundles=plain[:2], method="average", weights=weights, out=tmp_path / "run")


def test_fuse__other_architectures(tmp_path: Path, plain: list[Path], bundles: list[Path]) -> None:
    with pytest.raises(BundleError, match="not of one architecture"):
        api.fuse(bundles=[plain[0], bundles[0]], method="average", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fuse__two_equal_labels_are_two_models(tmp_path: Path, plain: list[Path]) -> None:
    """The same bundle twice has two shares."""
    api.fuse(bundles=[plain[0], plain[0], plain[1]], method="average", out=tmp_path / "run")
    first, other, found = (weights_of(path) for path in (plain[0], plain[1], tmp_path / "run"))
    for name, tensor in found.items():
        expected = (2 * first[name].double() + other[name].double()) / 3
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7, msg=name)


def test_fuse__other_normalisation(tmp_path: Path, plain: list[Path]) -> None:
    how = replace(SMALL, mean=(0.5, 0.5, 0.5))
    other = make_bundle(tmp_path / "other", NAMES, name="squeezenet1_1", how=how)
    with pytest.raises(BundleError, match="normalises"):
        api.fuse(bundles=[plain[0], other], method="average", out=tmp_path / "run")


def test_fuse__not_a_bundle(tmp_path: Path, plain: list[Path], data: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        api.fuse(bundles=[plain[0], data], method="average", out=tmp_path / "run")


@pytest.mark.parametrize(("value", "where"), [(float("nan"), "tensor"), (1e38, "output")])
def test_fuse__a_result_that_is_not_finite_is_refused(
    tmp_path: Path, plain: list[Path], value: float, where: str
) -> None:
    model, config = load_bundle(plain[0])
    model.features[0].weight.data[0] = value
    model.features[3].squeeze.weight.data[0] = value
    save_bundle(tmp_path / "bad", model, config)
    with pytest.raises(ModelError, match=f"refused: its {where}"):
        api.fuse(bundles=[plain[1], tmp_path / "bad"], method="average", out=tmp_path / "run")
    assert not (tmp_path / "run" / "bundle").exists()
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_fuse__too_many_broken_images(tmp_path: Path, bundles: list[Path]) -> None:
    data = make_images(tmp_path / "data", {"1": 4, "2": 4})
    (data / "1" / "0.png").write_bytes(b"broken")
    with pytest.raises(DomainError, match="1 of 8 images are broken"):
        api.fuse(bundles=bundles[:2], method="average", data=data, out=tmp_path / "run", workers=0)
    assert not (tmp_path / "run" / "bundle").exists()


# -- killed ------------------------------------------------------------------------------------------------


def test_fuse__killed_leaves_the_whole_bundle_or_none(tmp_path: Path, bundles: list[Path]) -> None:
    def work(out: Path) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        api.fuse(bundles=bundles, method="average", out=out)

    begin = time.monotonic()
    work(tmp_path / "undisturbed")
    seconds = time.monotonic() - begin
    expected = weights_of(tmp_path / "undisturbed")
    seen = set()
    for number, part in enumerate(np.linspace(0.1, 1.1, 8)):
        out = tmp_path / f"run{number}"
        child = multiprocessing.get_context("fork").Process(target=work, args=(out,))
        child.start()
        child.join(seconds * part)
        child.kill()
        child.join()
        seen.add((out / "bundle").exists())
        if (out / "bundle").exists():
            load_bundle(out)  # hashes are checked
        work(out)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(out).items())
        assert not list(out.glob(".tmp-*"))
    assert False in seen


def test_fuse__statistics_that_all_models_share_are_kept(tmp_path: Path, data: Path) -> None:
    """Linear probes of one backbone: only the heads differ, so there is nothing to re-estimate."""
    bundles = []
    for seed in (1, 2):
        model = lively_model("resnet18", len(NAMES))
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.fc.weight)
        config = BundleConfig(describe_network("resnet18", len(NAMES)), NAMES, SMALL)
        save_bundle(tmp_path / f"probe{seed}", model, config)
        bundles.append(tmp_path / f"probe{seed}")
    api.fuse(bundles=bundles, method="average", data=str(data), out=tmp_path / "r", workers=0)
    merged, first, second = (
        load_file(path / "model.safetensors") for path in (tmp_path / "r" / "bundle", *bundles)
    )
    for name in merged:
        if name.startswith("fc."):
            torch.testing.assert_close(merged[name], (first[name] + second[name]) / 2, rtol=0, atol=2e-7)
        else:
            assert torch.equal(merged[name], first[name]), name
