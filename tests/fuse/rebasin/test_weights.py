"""Weight matching against all permutations there are, and against a permutation that is known."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call

from tests.support_rebasin import build, restless, shuffled
from tldist.fuse.rebasin.spec import Permutations, Spec, cosine, identity, permute
from tldist.fuse.rebasin.trace import find_groups
from tldist.fuse.rebasin.weights import match_weights


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def mlp(*widths: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Flatten()]
    for narrow, wide in itertools.pairwise(widths):
        layers += [nn.Linear(narrow, wide), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def numbers(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    return [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in model
        if hasattr(layer, "weight")
    ]


def product(first: nn.Module, second: nn.Module, *orders: tuple[int, ...] | np.ndarray) -> float:
    """The inner product of two MLPs' parameters, the second's hidden units permuted: written out."""
    ours, theirs = numbers(first), numbers(second)
    total = 0.0
    for number, ((weight, bias), (other, shift)) in enumerate(zip(ours, theirs)):
        rows = list(orders[number]) if number < len(orders) else list(range(len(bias)))
        columns = list(orders[number - 1]) if number else list(range(weight.shape[1]))
        total += float((weight * other[rows][:, columns]).sum() + (bias * shift[rows]).sum())
    return total


def matched(first: nn.Module, second: nn.Module, seed: int = 0) -> list[np.ndarray]:
    spec = find_groups(first, (2, 2))
    return list(match_weights(state(first), state(second), spec, seed).values())


@pytest.mark.parametrize("hidden", [2, 5, 7])
@pytest.mark.parametrize("seed", range(4))
def test_match_weights__of_one_hidden_layer_is_the_best_of_all_permutations(hidden: int, seed: int) -> None:
    first, second = mlp(12, hidden, 3, seed=seed), mlp(12, hidden, 3, seed=seed + 100)
    best = max(itertools.permutations(range(hidden)), key=lambda order: product(first, second, order))
    (found,) = matched(first, second)
    assert found.tolist() == list(best)


@pytest.mark.parametrize("seed", range(6))
def test_match_weights__of_two_hidden_layers_cannot_be_bettered_in_one_of_them(seed: int) -> None:
    first, second = mlp(12, 5, 4, 3, seed=seed), mlp(12, 5, 4, 3, seed=seed + 100)
    left, right = matched(first, second, seed)
    value = product(first, second, left, right)
    every = [list(itertools.permutations(range(size))) for size in (5, 4)]
    best = max(product(first, second, a, b) for a in every[0] for b in every[1])
    assert value >= product(first, second, range(5), range(4))
    assert value <= best + 1e-12
    assert all(product(first, second, order, right) <= value + 1e-12 for order in every[0])
    assert all(product(first, second, left, order) <= value + 1e-12 for order in every[1])


def hidden(spec: Spec, tensors: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], Permutations]:
    order = shuffled(spec, seed)
    return permute(tensors, spec, order), order


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "densenet121", "small_vit", "regnet_y_400mf"]
)
def test_match_weights__finds_a_model_that_was_permuted(name: str) -> None:
    model = restless(build(name)).float()
    spec, tensors = find_groups(model, (32, 32)), state(model)
    other, order = hidden(spec, tensors, 5)
    assert cosine(tensors, other, spec) < 0.9
    found = match_weights(tensors, other, spec, seed=1)
    back = permute(other, spec, found)
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)
    assert all(np.array_equal(order[key][found[key]], np.arange(len(found[key]))) for key in found)
    assert cosine(tensors, back, spec) == pytest.approx(1)


def test_match_weights__finds_it_under_noise() -> None:
    model = restless(build("resnet18"))
    spec, tensors = find_groups(model, (32, 32)), state(model)
    other, order = hidden(spec, tensors, 5)
    noisy = {
        key: value + 0.3 * value.std() * torch.randn_like(value) if value.dim() > 1 else value
        for key, value in other.items()
    }
    found = match_weights(tensors, noisy, spec)
    assert all(np.array_equal(order[key][found[key]], np.arange(len(found[key]))) for key in found)


def test_match_weights__independent_models_come_closer_and_a_seed_gives_one_answer() -> None:
    first, second = (state(build("mobilenet_v3_small")) for _ in range(2))
    spec = find_groups(build("mobilenet_v3_small"), (32, 32))
    found, again = (match_weights(first, second, spec, seed=4) for _ in range(2))
    assert all(np.array_equal(found[name], again[name]) for name in found)
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in found.values())
    assert cosine(first, permute(second, spec, found), spec) > cosine(first, second, spec) + 0.05


@pytest.mark.parametrize("seed", range(5))
def test_match_weights__a_tie_moves_nothing(seed: int) -> None:
    """Every unit is there twice, so an assignment may swap the two; equal models stay as they are."""
    first = mlp(12, 5, 4, 3, seed=seed)
    spec = find_groups(first, (2, 2))
    tensors = state(first)
    for name, axes in [
        ("1.weight", [0]),
        ("1.bias", [0]),
        ("3.weight", [0, 1]),
        ("3.bias", [0]),
        ("5.weight", [1]),
    ]:
        for axis in axes:
            tensors[name] = torch.cat([tensors[name], tensors[name]], axis)
    wide = Spec(tuple(replace(group, size=2 * group.size) for group in spec.groups))
    found = match_weights(tensors, tensors, wide, seed)
    assert all(np.array_equal(found[name], order) for name, order in identity(wide).items())


def test_match_weights__joins_basins_of_networks_that_were_trained_apart() -> None:
    """What it is for: the mean of two classifiers, trained from other starts, works once they are aligned."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None].expand(-1, 3, -1, -1) / 16
    labels = torch.from_numpy(digits.target)
    models = [trained(images, labels, seed) for seed in (1, 2)]
    first, second = (state(model) for model in models)
    spec = find_groups(models[0], (8, 8))
    aligned = permute(second, spec, match_weights(first, second, spec))
    accuracy = [
        float((functional_call(models[0], tensors, (images,)).argmax(1) == labels).float().mean())
        for tensors in (first, second, mean_of(first, second), mean_of(first, aligned))
    ]
    assert min(accuracy[:2]) > 0.97
    assert accuracy[3] > 0.97
    assert 1 - accuracy[3] < (1 - accuracy[2]) / 2


def trained(images: Tensor, labels: Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(100):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
    return model


def mean_of(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (first[name] + second[name]) / 2 for name in first}


def test_match_weights__statistics_do_not_count_and_scales_do() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    spec = find_groups(model, (8, 8))
    plain = {name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()}
    order = np.roll(np.arange(6), 1)
    for name, expected in [("1.running_mean", np.arange(6)), ("1.weight", np.argsort(order))]:
        first = {**plain, name: torch.arange(1.0, 7)}
        second = permute(first, spec, {spec.groups[0].name: order})
        (found,) = match_weights(first, second, spec).values()
        assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_match_weights__a_group_on_both_axes_of_a_weight_ends_and_gains(seed: int) -> None:
    """A residual layer reads and writes one stream: its assignment is quadratic, and is linearised."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Linear(12, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)

        def forward(self, images: Tensor) -> Tensor:
            x = self.stem(images.flatten(1))
            answer: Tensor = self.head(x + self.inner(x))
            return answer

    torch.manual_seed(seed)
    model = Residual()
    spec = find_groups(model, (2, 2))
    assert len(spec.groups) == 1
    first, second = state(model), state(Residual())
    for tensors in (first, second):
        tensors["inner.weight"] *= 8  # outweighs the rest, so that the linearised step may lose
    found = match_weights(first, second, spec, seed)
    assert cosine(first, permute(second, spec, found), spec) >= cosine(first, second, spec)
    other, order = hidden(spec, first, seed)
    back = match_weights(first, other, spec, seed)
    assert cosine(first, permute(other, spec, back), spec) >= cosine(first, other, spec)
    assert set(back) == set(order)
