"""Fine-tunes of one ResNet-18, whose BatchNorm statistics task vectors turn negative: every method is finite.

``mergekit-pytorch`` 0.1.5 merges running variances as if they were weights: from a base with wide statistics
and narrower fine-tunes it writes negative variances, and a model that answers NaN, with exit code 0.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import make_images
from tests.support_models import SMALL, lively_model
from tldist import api
from tldist.bundle import BundleConfig, read_bundle
from tldist.fuse.weights.methods import METHODS
from tldist.models.load import load_bundle, save_bundle
from tldist.models.zoo import describe_network

NAMES = ("a", "b", "c")
MORE = {
    "adamerging": {"adamerging": {"steps": 4}},
    "fisher": {"samples": 16},
    "slerp": {"bundles": 2},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for seed, split in enumerate(("train", "val")):
        make_images(root / split, dict.fromkeys(NAMES, 32), seed=seed)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, data: Path) -> list[Path]:
    """The base first; its statistics are wide, as of a domain of more contrast."""
    root = tmp_path_factory.mktemp("models")
    base = lively_model("resnet18", 3)
    for module in base.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.mul_(16)
    save_bundle(root / "base", base, BundleConfig(describe_network("resnet18", 3), NAMES, SMALL))
    paths = [root / "base"]
    for seed in range(3):
        api.finetune(
            data=data,
            model=root / "base",
            out=root / f"run{seed}",
            epochs=3,
            train="all",
            batch_size=8,
            seed=seed,
            optimizer={"lr": 1e-3},
            workers=0,
        )
        paths.append(root / f"run{seed}")
    return paths


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load_file(read_bundle(path)[0] / "model.safetensors")


def test_resnet__merged_as_weights_the_variances_would_be_negative(models: list[Path]) -> None:
    """What the other tests here are about: without it they would prove nothing."""
    base, *tuned = (tensors_of(path) for path in models)
    name = "layer1.0.bn1.running_var"
    merged = base[name] + 0.5 * sum(tensors[name] - base[name] for tensors in tuned)
    assert (merged < 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_resnet__every_method_is_finite_and_recalibration_does_not_harm(
    tmp_path: Path, models: list[Path], data: Path, method: str
) -> None:
    base, *tuned = models
    more = dict(MORE.get(method, {}))
    given = tuned[: more.pop("bundles", 3)]
    scale = {"scale": 0.5} if "scale" in METHODS[method].uses else {}
    api.fuse(
        bundles=given, base=base, method=method, data=data, out=tmp_path / "run", workers=0, **scale, **more
    )
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    tensors = tensors_of(tmp_path / "run")
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())
    assert all((t >= 0).all() for name, t in tensors.items() if name.endswith("running_var"))
    model, _ = load_bundle(tmp_path / "run")
    assert torch.isfinite(model(torch.randn(4, 3, 32, 32))).all()
    assert summary["batchnorm_batches"] > 0
    assert summary["after"]["accuracy"] >= summary["merged"]["accuracy"]


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.aid is None])
def test_resnet__without_data_the_pooled_statistics_are_finite_too(
    tmp_path: Path, models: list[Path], method: str
) -> None:
    base, *tuned = models
    given = tuned[:2]
    api.fuse(bundles=given, base=base, method=method, out=tmp_path / "run", workers=0)
    tensors = tensors_of(tmp_path / "run")
    assert all((t >= 0).all() for name, t in tensors.items() if name.endswith("running_var"))
    model, _ = load_bundle(tmp_path / "run")
    assert torch.isfinite(model(torch.randn(4, 3, 32, 32))).all()
