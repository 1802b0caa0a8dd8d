"""A person's own method, tied weights, and what the report shows of a fusion."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.nets import tied_cnn
from tests.support import make_images
from tests.support_models import SMALL, lively_model, make_bundle
from tldist import api
from tldist.bundle import BundleConfig, read_bundle
from tldist.errors import RecipeError
from tldist.fuse.weights.linear import Array
from tldist.fuse.weights.method import Settings
from tldist.models.load import save_bundle
from tldist.models.zoo import describe_network

NAMES = ("a", "b")


def largest(models: list[Array], base: Array | None, settings: Settings) -> Array:
    """The entries of largest size: a method of one's own."""
    stacked = np.stack(models)
    return np.take_along_axis(stacked, np.abs(stacked).argmax(0)[None], 0)[0]


def test_own_method__is_a_dotted_path(tmp_path: Path) -> None:
    bundles = [make_bundle(tmp_path / f"m{n}", NAMES, name="tests.nets:plain_cnn", seed=n) for n in range(3)]
    api.fuse(bundles=bundles, method=f"{__name__}:largest", out=tmp_path / "run", trust_code=True)
    parents = [load_file(path / "model.safetensors") for path in bundles]
    for name, tensor in load_file(tmp_path / "run" / "bundle" / "model.safetensors").items():
        if "running_" in name or not tensor.is_floating_point():
            continue
        stacked = torch.stack([parent[name] for parent in parents])
        expected = stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]
        assert torch.equal(tensor, expected), name
    with pytest.raises(RecipeError, match="cannot be imported"):
        api.fuse(bundles=bundles, method="nowhere:largest", out=tmp_path / "other", trust_code=True)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "ties", "average"])
def test_tied_weights__stay_tied(tmp_path: Path, method: str) -> None:
    """Random masks go by the name of a tensor, and one weight has two."""
    name = "tests.nets:tied_cnn"
    bundles = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = tied_cnn(2).eval()
        save_bundle(tmp_path / f"m{seed}", model, BundleConfig(describe_network(name, 2), NAMES, SMALL))
        bundles.append(tmp_path / f"m{seed}")
    api.fuse(bundles=bundles[1:], base=bundles[0], method=method, out=tmp_path / "run", trust_code=True)
    found = load_file(tmp_path / "run" / "bundle" / "model.safetensors")
    assert torch.equal(found["first.weight"], found["second.weight"])
    assert not torch.equal(found["first.weight"], load_file(bundles[1] / "model.safetensors")["first.weight"])


def test_report__shows_a_search_and_its_choice(tmp_path: Path) -> None:
    data = make_images(tmp_path / "data", dict.fromkeys(NAMES, 6))
    model = lively_model("tests.nets:plain_cnn", 2)
    bundles = []
    for seed in range(2):
        torch.manual_seed(seed)
        nn.init.normal_(model[-1].weight)
        save_bundle(
            tmp_path / f"m{seed}",
            model,
            BundleConfig(describe_network("tests.nets:plain_cnn", 2), NAMES, SMALL),
        )
        bundles.append(tmp_path / f"m{seed}")
    run = tmp_path / "run"
    api.fuse(
        bundles=bundles, method="search", data=data, search={"points": 2}, out=run, trust_code=True, workers=0
    )
    api.report(runs=[run], out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    search = json.loads((run / "summary.json").read_text())["search"]
    assert "Merges tried" in page
    assert all(row["name"].split("/")[-1] in page for row in search["table"])


def test_raw__mixed_folders_of_one_family(tmp_path: Path) -> None:
    """A file, a folder of one file and a bundle, in one merge."""
    bundle = make_bundle(tmp_path / "bundle", NAMES, name="squeezenet1_1")
    tensors = load_file(read_bundle(bundle)[0] / "model.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    (tmp_path / "folder").mkdir()
    save_file({name: tensor * 3 for name, tensor in tensors.items()}, tmp_path / "folder" / "x.safetensors")
    given = [tmp_path / "plain.safetensors", tmp_path / "folder", bundle]
    api.fuse(bundles=given, method="average", raw=True, out=tmp_path / "run")
    for name, tensor in load_file(tmp_path / "run" / "weights" / "model.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name] * (5 / 3), rtol=1e-6, atol=1e-6)
