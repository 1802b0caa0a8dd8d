"""Re-estimated BatchNorm statistics against PyTorch's own update and a float64 computation by hooks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from tests.support import make_images
from tests.support_models import SMALL, lively_model
from tests.support_processes import run_ranks
from tldist import distributed
from tldist.data.loader import load_batches
from tldist.domain import DataRecipe, open_domain
from tldist.errors import DomainError
from tldist.models.load import input_tensor
from tldist.training.batchnorm import batchnorm_layers, even_batches, reestimate
from tldist.training.ledger import Ledger


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"a": 9, "b": 8, "c": 6})


def refresh(model: nn.Module, folder: Path, batch_size: int, most: int | None = None) -> int:
    domain = open_domain(DataRecipe(path=str(folder), max_bad=0.2))
    team = distributed.start()
    return reestimate(
        model, SMALL, domain, team, Ledger(domain, None), batch_size=batch_size, seed=3, most_batches=most
    )


def inputs(folder: Path, batch_size: int) -> list[torch.Tensor]:
    domain = open_domain(folder)
    plans = even_batches(len(domain), batch_size, seed=3)
    return [input_tensor(batch.images, SMALL) for batch in load_batches(domain, plans, SMALL)]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize(
    ("size", "batch_size"), [(23, 8), (24, 8), (1, 8), (8, 8), (9, 8), (1000, 64), (5, 2)]
)
def test_even_batches__every_position_once_and_sizes_even(size: int, batch_size: int) -> None:
    batches = even_batches(size, batch_size, seed=0)
    sizes = [len(batch) for batch in batches]
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_even_batches__classes_in_order_are_mixed() -> None:
    labels = np.repeat([0, 1, 2], 30)
    batches = even_batches(90, 15, seed=0)
    assert all(len(set(labels[batch].tolist())) > 1 for batch in batches)
    assert not np.array_equal(np.concatenate(batches), np.concatenate(even_batches(90, 15, seed=1)))


@pytest.mark.parametrize("batch_size", [4, 8, 64])
def test_reestimate__equals_pytorchs_update_bn(images: Path, batch_size: int) -> None:
    ours, theirs = lively_model("resnet18", 3), lively_model("resnet18", 3)
    before = statistics(ours)
    used = refresh(ours, images, batch_size)
    batches = inputs(images, batch_size)
    update_bn(batches, theirs)
    assert used == len(batches)
    for name, buffer in statistics(theirs).items():
        torch.testing.assert_close(statistics(ours)[name], buffer, rtol=1e-5, atol=1e-6, msg=name)
    assert not torch.equal(before["bn1.running_mean"], statistics(ours)["bn1.running_mean"])


def test_reestimate__equals_float64_means_and_variances_seen_by_hooks(images: Path) -> None:
    """By another route: the whole network in float64, each layer's inputs caught on the way."""
    model = lively_model("resnet18", 3)
    reference = lively_model("resnet18", 3).double()
    seen: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def catch(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple[torch.Tensor]) -> None:
            values = args[0].transpose(0, 1).flatten(1)
            seen.setdefault(name, []).append((values.mean(1), values.var(1)))

        return hook

    for name, module in reference.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(catch(name))
            module.train()
    with torch.no_grad():
        for batch in inputs(images, 8):
            reference(batch.double())
    refresh(model, images, 8)
    found = statistics(model)
    for name, values in seen.items():
        means, variances = (torch.stack(column).mean(0) for column in zip(*values))
        torch.testing.assert_close(found[f"{name}.running_mean"].double(), means, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"{name}.running_var"].double(), variances, rtol=1e-4, atol=1e-5)


def test_reestimate__leaves_everything_else_as_it_was(images: Path) -> None:
    model = lively_model("mobilenet_v3_small", 3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    momentum = [layer.momentum for layer in batchnorm_layers(model)]
    refresh(model, images, 8)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not any(module.training for module in model.modules())
    assert [layer.momentum for layer in batchnorm_layers(model)] == momentum


def test_reestimate__fits_the_data(images: Path) -> None:
    """Afterwards the first layer's outputs have the scale and shift that its parameters say."""
    model = lively_model("resnet18", 3)
    refresh(model, images, 64)
    with torch.no_grad():
        outputs = model.bn1(model.conv1(inputs(images, 64)[0])).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs.mean(1), model.bn1.bias, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(outputs.std(1), model.bn1.weight.abs(), atol=1e-3, rtol=1e-3)


def _refreshed(folder: Path, batch_size: int, most: int | None) -> dict[str, np.ndarray]:
    model = lively_model("resnet18", 3)
    refresh(model, folder, batch_size, most)
    return {name: buffer.numpy() for name, buffer in statistics(model).items()}


@pytest.mark.parametrize(("batch_size", "most"), [(4, None), (5, 3), (64, None)])  # 64: an idle process
def test_reestimate__processes_do_not_matter(images: Path, batch_size: int, most: int | None) -> None:
    alone = run_ranks(_refreshed, 1, images, batch_size, most)[0]
    for ranks in (2, 3):
        for found in run_ranks(_refreshed, ranks, images, batch_size, most):
            for name, buffer in alone.items():
                np.testing.assert_allclose(found[name], buffer, rtol=1e-6, err_msg=name)


def test_reestimate__broken_images_are_left_out(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"a": 4, "b": 5})
    whole = make_images(tmp_path / "whole", {"a": 4, "b": 4})
    (folder / "b" / "4.png").write_bytes(b"broken")
    found, expected = lively_model("resnet18", 2), lively_model("resnet18", 2)
    refresh(found, folder, 64)
    refresh(expected, whole, 64)
    torch.testing.assert_close(found.bn1.running_var, expected.bn1.running_var, rtol=1e-5, atol=1e-6)


def test_reestimate__a_single_image_is_too_few(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"a": 1})
    model = lively_model("resnet18", 2)
    before = statistics(model)
    with pytest.raises(DomainError, match="two images"):
        refresh(model, folder, 8)
    assert all(torch.equal(before[name], buffer) for name, buffer in statistics(model).items())


def test_reestimate__a_layer_that_is_not_reached_keeps_its_statistics(images: Path) -> None:
    model = lively_model("resnet18", 3)
    model.spare = nn.BatchNorm2d(4)
    model.spare.running_mean.fill_(3.0)
    refresh(model, images, 8)
    assert model.spare.running_mean.tolist() == [3.0] * 4
