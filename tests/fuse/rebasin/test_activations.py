"""Activation matching: known permutations come back, correlations are numpy's, processes do not matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import make_images
from tests.support_models import SMALL
from tests.support_processes import run_ranks
from tests.support_rebasin import build, restless, shuffled
from tldist import distributed
from tldist.data.loader import load_batches
from tldist.domain import DataRecipe, open_domain
from tldist.errors import DomainError
from tldist.fuse.rebasin.activations import _Sums, match_activations, on_model, watching
from tldist.fuse.rebasin.spec import Permutations, Tap, permute
from tldist.fuse.rebasin.trace import find_groups
from tldist.models.load import input_tensor
from tldist.training.ledger import Ledger


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"a": 9, "b": 8, "c": 6})


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def matched(
    model: nn.Module, first: dict[str, Tensor], second: dict[str, Tensor], folder: Path, batch_size: int = 8
) -> Permutations:
    domain = open_domain(DataRecipe(path=str(folder), max_bad=0.5))
    spec = find_groups(model, (32, 32))
    return match_activations(
        model, first, second, spec, SMALL, domain, distributed.start(), Ledger(domain, None),
        batch_size=batch_size, seed=2,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "densenet121", "small_vit", "regnet_y_400mf"])
def test_match_activations__finds_a_model_that_was_permuted(name: str, images: Path) -> None:
    model = restless(build(name)).float()
    spec, tensors = find_groups(model, (32, 32)), state(model)
    order = shuffled(spec, 5)
    found = matched(model, tensors, permute(tensors, spec, order), images)
    wrong = {key: order[key][found[key]] != np.arange(len(found[key])) for key in found}
    assert not {key for key, moved in wrong.items() if moved.any()}


def test_match_activations__what_the_units_do_counts_and_not_their_scale(images: Path) -> None:
    """Scaled units, their readers scaled back: the weights are others, the behaviour is the same."""
    model = restless(build("resnet18")).float()
    spec, tensors = find_groups(model, (32, 32)), state(model)
    order = shuffled(spec, 5)
    other = permute(tensors, spec, order)
    scale = torch.rand(64) * 5 + 0.1
    for name in ("weight", "bias"):
        other[f"layer1.0.bn1.{name}"] = other[f"layer1.0.bn1.{name}"] * scale
    other["layer1.0.conv2.weight"] = other["layer1.0.conv2.weight"] / scale[:, None, None]
    found = matched(model, tensors, other, images)
    assert all(np.array_equal(order[key][found[key]], np.arange(len(found[key]))) for key in found)


@pytest.mark.parametrize("parts", [[40], [7, 20, 13]])
def test_sums__correlations_are_numpys(parts: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4, 40, generator=generator) * 3 + 100
    second = first[[2, 0, 3, 1]] + torch.randn(4, 40, generator=generator)
    second[3] = 7.7  # a unit that always says the same
    sums = _Sums(4)
    for mine, theirs in zip(first.split(parts, 1), second.split(parts, 1)):
        sums.add(mine, theirs)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(first.double(), second.double())[:4, 4:])
    assert sums.count == 40
    np.testing.assert_allclose(sums.correlations(), expected, atol=1e-9)


@torch.no_grad()
def test_watching__gives_what_layers_read(images: Path) -> None:
    model = restless(build("resnet18")).float()
    domain = open_domain(images)
    inputs = input_tensor(next(load_batches(domain, [np.arange(4)], SMALL)).images, SMALL)
    hidden = model.maxpool(model.relu(model.bn1(model.conv1(inputs))))
    inside = model.layer1[0].relu(model.layer1[0].bn1(model.layer1[0].conv1(hidden)))
    with watching(model, find_groups(model, (32, 32))) as watched:
        model(inputs)
    for name, reader, expected in [
        ("conv1.weight:0", "layer1.0.conv1", hidden),
        ("layer1.0.conv1.weight:0", "layer1.0.conv2", inside),
    ]:
        (rows,) = watched[name, Tap(reader, "input", 1)]
        assert torch.equal(rows, expected.transpose(0, 1).flatten(1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def test_watching__keeps_what_a_later_layer_overwrites() -> None:
    model = restless(build("squeezenet1_1")).float()
    images = torch.randn(1, 3, 32, 32)
    with watching(model, find_groups(model, (32, 32))) as watched:
        model(images)
    (rows,) = watched["features.0.weight:0", Tap("features.0", "output", 1)]
    torch.testing.assert_close(rows, model.features[0](images)[0].flatten(1))
    assert rows.min() < 0  # before the ReLU, which works in place


@torch.no_grad()
def test_watching__gives_the_attention_of_each_head() -> None:
    model = restless(build("small_vit")).float()
    spec = find_groups(model, (32, 32))
    images = torch.randn(3, 3, 32, 32)
    block = model.encoder.layers[0]
    with watching(model, spec) as watched:
        model(images)
    tokens = model._process_input(images)
    tokens = torch.cat([model.class_token.expand(3, -1, -1), tokens], 1) + model.encoder.pos_embedding
    normed = block.ln_1(tokens)
    query, key, _ = (
        normed @ block.self_attention.in_proj_weight.T + block.self_attention.in_proj_bias
    ).chunk(3, -1)
    query, key = (value.unflatten(-1, (4, 6)).transpose(1, 2) for value in (query, key))
    expected = (query @ key.transpose(2, 3) / 6**0.5).softmax(-1)
    path = "encoder.layers.encoder_layer_0.self_attention"
    (rows,) = watched[f"{path}.in_proj_weight:heads", Tap(path, "attention", 1)]
    torch.testing.assert_close(rows, expected.transpose(0, 1).flatten(1), rtol=1e-4, atol=1e-6)


def _found(folder: Path, batch_size: int) -> Permutations:
    first, second = (restless(build("mobilenet_v3_small"), seed).float() for seed in (0, 1))
    return matched(first, state(first), state(second), folder, batch_size)


@pytest.mark.parametrize("batch_size", [4, 64])  # 64: an idle process
def test_match_activations__processes_do_not_matter(images: Path, batch_size: int) -> None:
    alone = run_ranks(_found, 1, images, batch_size)[0]
    assert any((order != np.arange(len(order))).any() for order in alone.values())
    for found in run_ranks(_found, 2, images, batch_size):
        assert all(np.array_equal(found[name], order) for name, order in alone.items())


def test_match_activations__broken_images_are_left_out_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"a": 4, "b": 5})
    whole = make_images(tmp_path / "whole", {"a": 4, "b": 4})
    (folder / "b" / "4.png").write_bytes(b"broken")
    model, other = (restless(build("squeezenet1_1"), seed).float() for seed in (0, 1))
    found, expected = (matched(model, state(model), state(other), path, 64) for path in (folder, whole))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(DomainError, match="9 of 9 images are broken"):
        matched(model, state(model), state(other), folder)


def test_on_model__takes_the_models_types() -> None:
    model = build("resnet18")
    halves = {
        name: value.half() if value.is_floating_point() else value for name, value in state(model).items()
    }
    assert {name: value.dtype for name, value in on_model(model, halves).items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }
