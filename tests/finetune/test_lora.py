"""LoRA: what learns, what rests, and that the merged bundle computes what was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import make_splits
from tldist import api
from tldist.data.order import seed_of
from tldist.errors import ModelError, RecipeError
from tldist.models.blocks import cut_blocks, freeze, trainable_blocks
from tldist.models.load import load_bundle, start_model
from tldist.models.lora import add_lora
from tldist.models.zoo import build_network, describe_network

pytest.importorskip("peft", reason="needs the extra peft")

SETTINGS = {
    "weights": "none", "image_size": 32, "precision": "fp32", "batch_size": 8, "workers": 0, "epochs": 3,
    "augment": {"crop": None, "flip": False}, "calibrate": False, "select": "last",
    "optimizer": {"lr": 0.02, "warmup": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_splits(
        tmp_path_factory.mktemp("data") / "d", {"cat": 10, "dog": 8, "emu": 6}, {"cat": 4, "dog": 4, "emu": 4}
    )


def tuned(data: Path, out: Path, **settings: object) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    api.finetune(data=str(data), out=out, **{**SETTINGS, **settings})
    return load_file(out / "bundle/model.safetensors"), json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_lora__changes_each_adapted_weight_by_a_product_of_its_rank_and_nothing_else(
    data: Path, tmp_path: Path, cache: str
) -> None:
    after, summary = tuned(
        data, tmp_path / "r", model="resnet18", train="last:2", lora=2,
        cache={"use": cache, "folder": tmp_path / "cache"},
    )  # fmt: skip
    torch.manual_seed(seed_of("init", 0))
    start = start_model("resnet18", "none", ("cat", "dog", "emu"), image_size=32).model
    before = start.state_dict()
    assert set(after) == set(before)  # the architecture's own names

    learning = trainable_blocks(start, cut_blocks(start), "last:2")[:-1]
    adapted = {n for n, t in before.items() if t.dim() == 4 and any(b.owns(n) for b in learning)}
    assert adapted
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == adapted | {"fc.weight", "fc.bias"}
    for name in adapted:
        change = (after[name] - before[name]).double().flatten(1)
        values = torch.linalg.svdvals(change)
        # A convolution's adapter is a k x k convolution to `rank` channels and a 1 x 1 one back.
        assert values[2] < 1e-4 * values[0]
        assert values[1] > 1e-3 * values[0]

    model, _ = load_bundle(tmp_path / "r/bundle")
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert summary["lora"]["layers"] == len(adapted)
    assert summary["lora"]["rank"] == 2
    assert 0 < summary["lora"]["merge_difference"] < 1e-4
    assert summary["frozen"]["equal"] is True
    found = api.evaluate(model=tmp_path / "r/bundle", data=str(data / "val"), workers=0)
    assert found.values["accuracy"] == summary["validation"]["accuracy"]


def test_lora__resumed_is_bitwise_the_undisturbed_run(data: Path, tmp_path: Path) -> None:
    same = {"model": "resnet18", "train": "all", "lora": {"rank": 4, "dropout": 0.2}, "ema": 0.9}
    whole, _ = tuned(data, tmp_path / "whole", **same)
    tuned(data, tmp_path / "parts", **{**same, "epochs": 3, "patience": None, "checkpoint": {"keep": 9}})
    # As if it had been killed after the first epoch: later checkpoints and the result are not there.
    for path in (tmp_path / "parts/checkpoints").glob("step-*"):
        if int(path.name[5:]) > 3:
            shutil.rmtree(path)
    shutil.rmtree(tmp_path / "parts/bundle")
    (tmp_path / "parts/summary.json").unlink()
    resumed, _ = tuned(data, tmp_path / "parts", **{**same, "checkpoint": {"keep": 9}})
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("name", "size", "bypassed"),
    [("vit_b_32", 224, False), ("swin_t", 64, True), ("mobilenet_v3_small", 64, False)],
)
def test_adapters__start_as_nothing_learn_everywhere_and_merge(name: str, size: int, bypassed: bool) -> None:
    torch.manual_seed(0)
    model = build_network(describe_network(name, 5), trust_code=False).eval()
    nn.init.normal_(next(m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)).weight)
    images = torch.randn(2, 3, size, size)
    blocks = cut_blocks(model)
    learning = trainable_blocks(model, blocks, "last:2")
    names, before = set(model.state_dict()), model(images)
    adapters = add_lora(model, learning, blocks[-1], (size, size), rank=3, alpha=6.0, dropout=0.0)
    model.eval()
    assert torch.allclose(model(images), before, atol=1e-4 * float(before.abs().max()))
    assert bool(adapters.bypassed) == bypassed

    freeze(model, adapters.beside(learning, blocks[-1]))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.05)
    model(images).square().sum().backward()
    learns = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and bool((p.grad != 0).any()) for n, p in learns.items())
    assert {n for n in learns if "lora_" not in n} == {
        n for n, _ in model.named_parameters() if blocks[-1].owns(n)
    }

    trained = model(images)
    assert not torch.allclose(trained, before, rtol=0.01)
    found = adapters.merge(images)
    assert set(model.state_dict()) == names
    assert torch.allclose(model(images), trained, atol=1e-4 * float(trained.abs().max()))
    assert found["merge_difference"] < 1e-4


def test_merge__of_a_weight_that_two_layers_share_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.head = nn.Linear(3, 2)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(images.mean((2, 3)))))

    model = Tied()
    blocks = cut_blocks(model)
    adapters = add_lora(model, blocks, blocks[-1], (4, 4), rank=2, alpha=4.0, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with pytest.raises(ModelError, match="merging the LoRA adapters changes the outputs"):
        adapters.merge(torch.randn(4, 3, 4, 4))


def test_lora__refuses_what_it_cannot_do(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"it goes with train=last:N"):
        tuned(data, tmp_path / "a", model="resnet18", train="head", lora=2)
    with pytest.raises(RecipeError, match=r"no linear, attention or plain convolution layer"):
        tuned(data, tmp_path / "b", model="resnet18", train="re:bn1.weight", lora=2)
