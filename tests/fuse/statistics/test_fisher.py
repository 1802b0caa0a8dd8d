"""Fisher information against loops of autograd in float64, image by image and class by class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import make_images
from tests.support_models import SMALL, lively_model
from tests.support_processes import run_ranks
from tldist import distributed
from tldist.bundle import Task
from tldist.data.loader import load_batches
from tldist.domain import DataRecipe, open_domain
from tldist.errors import DomainError
from tldist.fuse.statistics.fisher import directions, fisher_information, normalised
from tldist.fuse.statistics.walk import Walk, walk_batches
from tldist.fuse.weights.informed import fisher_average, plain_average
from tldist.models.load import input_tensor
from tldist.training.ledger import Ledger


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"a": 4, "b": 5, "c": 2})


def small_net(num_classes: int, seed: int = 0) -> nn.Module:
    """Convolutions with stride and groups, BatchNorm, a norm over channels, a linear head."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.GELU(),
        nn.GroupNorm(2, 8),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, num_classes),
    )
    model[1].running_mean.normal_(0, 0.3)
    model[1].running_var.uniform_(0.5, 1.5)
    return model.eval()


class Branching(nn.Module):
    """Decides by the values of its features, which many images at once do not allow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 5, 4, stride=4), nn.Linear(5, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images).mean((2, 3))
        if features.sum().item() > 0:
            features = 2 * features
        return self.head(features)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 4, stride=8)
        self.first, self.second = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.conv(images).mean((2, 3))).tanh()))


def fisher(model: nn.Module, folder: Path, max_bad: float = 0.2, **options: object) -> dict[str, Tensor]:
    domain = open_domain(DataRecipe(path=str(folder), max_bad=max_bad))
    walk = Walk(options.pop("samples", None), options.pop("batch_size", 4), seed=5)  # type: ignore[arg-type]
    return fisher_information(
        model, SMALL, domain, distributed.start(), Ledger(domain, None), walk=walk, **options
    )


def inputs(folder: Path) -> Tensor:
    domain = open_domain(folder)
    return input_tensor(next(load_batches(domain, [np.arange(len(domain))], SMALL)).images, SMALL)


def by_loops(model: nn.Module, images: Tensor, likelihood: Callable[[Tensor], list[tuple[Tensor, Tensor]]]):
    """The mean over images of sums of ``chance * (d log likelihood / d theta)^2``, in float64.

    Args:
        likelihood: logits (K,) to pairs of chance and log-likelihood, one an answer.
    """
    model = model.double()
    names, parameters = zip(*model.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in zip(names, parameters)}
    for image in images.double():
        for chance, log in likelihood(model(image[None])[0]):
            gradients = torch.autograd.grad(log, parameters, retain_graph=True, allow_unused=True)
            for name, gradient in zip(names, gradients):
                if gradient is not None:
                    total[name] += chance.detach() * gradient**2 / len(images)
    return total


def one_class(logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    logs = logits.log_softmax(0)
    return [(log.exp(), log) for log in logs]


def every_set(logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """All sets of independent classes, one by one."""
    found = []
    for number in range(2 ** len(logits)):
        chosen = torch.tensor([bool(number >> k & 1) for k in range(len(logits))])
        log = torch.where(chosen, logits, -logits).sigmoid().log().sum()
        found.append((log.exp(), log))
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 2e-4) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == torch.float64
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=1e-6 * float(value.max()) + 1e-30, msg=name
        )
    assert any(value.max() > 1e-6 for value in expected.values())


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_fisher__equals_loops_over_images_and_classes(
    images: Path, num_classes: int, batch_size: int
) -> None:
    found = fisher(small_net(num_classes), images, batch_size=batch_size)
    assert_same(found, by_loops(small_net(num_classes), inputs(images), one_class))


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_fisher__of_the_zoo_equals_loops(tmp_path: Path, name: str) -> None:
    folder = make_images(tmp_path / "images", {"a": 2, "b": 1})
    found = fisher(lively_model(name, 3), folder)
    assert_same(found, by_loops(lively_model(name, 3), inputs(folder), one_class), rtol=2e-3)


def test_fisher__of_a_double_model_is_exact(images: Path) -> None:
    model = nn.Sequential(_AsDouble(), small_net(3).double())
    found = fisher(model, images)
    expected = by_loops(small_net(3), inputs(images), one_class)
    assert_same({name.removeprefix("1."): value for name, value in found.items()}, expected, rtol=1e-9)


class _AsDouble(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.double()


def test_fisher__several_classes_an_image_are_independent(images: Path) -> None:
    found = fisher(small_net(3), images, task="multilabel")
    assert_same(found, by_loops(small_net(3), inputs(images), every_set))


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_fisher__drawn_labels_have_the_exact_expectation(task: Task) -> None:
    """Over many draws the outer products of the directions are those of the exact ones: that is all of F."""
    logits = torch.randn(1, 5, generator=torch.Generator().manual_seed(1)).repeat(20_000, 1)
    exact = directions(logits[:1], task, 5, np.arange(1), 0)[0]
    drawn = directions(logits, task, 4, np.arange(len(logits)), 0)[:, 0]
    assert drawn.shape == (20_000, 5)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), exact.T @ exact, atol=0.01, rtol=0)


def test_fisher__drawn_labels_follow_seed_and_position_alone(images: Path) -> None:
    found = fisher(small_net(7), images, exact_classes=3)
    other_batches = fisher(small_net(7), images, exact_classes=3, batch_size=1)
    assert_same(other_batches, found, rtol=1e-4)
    logits = torch.zeros(6, 4)
    rows = directions(logits, "multiclass", 2, np.array([3, 9, 27, 4, 5, 6]), 1)
    again = directions(logits[:2], "multiclass", 2, np.array([9, 3]), 1)
    assert torch.equal(again[0], rows[1])
    assert torch.equal(again[1], rows[0])
    assert not torch.equal(directions(logits, "multiclass", 2, np.array([3, 9, 27, 4, 5, 6]), 2), rows)


def test_fisher__little_memory_gives_the_same(images: Path) -> None:
    assert_same(fisher(small_net(3), images, gradient_bytes=1), fisher(small_net(3), images), rtol=1e-4)
    size = sum(p.numel() * 4 for p in small_net(3).parameters())
    few = fisher(small_net(3), images, gradient_bytes=5 * size)
    assert_same(few, fisher(small_net(3), images), rtol=1e-4)


def test_fisher__one_by_one_where_the_model_decides_by_values(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Branching()
    found = fisher(model, images)
    assert "one by one" in capsys.readouterr().err
    assert_same(found, by_loops(model, inputs(images), one_class))
    assert found["unused.weight"].count_nonzero() == 0


def test_fisher__a_shared_weight_is_given_under_both_names(images: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    found = fisher(model, images)
    assert torch.equal(found["first.weight"], found["second.weight"])
    found.pop("second.weight")
    assert_same(found, by_loops(model, inputs(images), one_class))


def test_fisher__frozen_parameters_count_and_the_model_stays_as_it_was(images: Path) -> None:
    model = small_net(3)
    expected = fisher(model, images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].weight.requires_grad_(False)
    assert_same(fisher(model.train(), images), expected, rtol=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not model.training


def test_fisher__samples_are_those_of_the_seed(images: Path) -> None:
    (chosen,) = walk_batches(11, Walk(samples=4, batch_size=8, seed=5))
    found = fisher(small_net(3), images, samples=4)
    assert_same(found, by_loops(small_net(3), inputs(images)[chosen], one_class))


def test_fisher__broken_images_are_left_out(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"a": 4, "b": 5})
    whole = make_images(tmp_path / "whole", {"a": 4, "b": 4})
    (folder / "b" / "4.png").write_bytes(b"broken")
    assert_same(fisher(small_net(2), folder), by_loops(small_net(2), inputs(whole), one_class))
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DomainError, match="no image could be decoded"):
        fisher(small_net(2), folder, max_bad=1.0)


def _found(folder: Path, exact_classes: int, samples: int | None) -> dict[str, np.ndarray]:
    found = fisher(small_net(5), folder, exact_classes=exact_classes, samples=samples)
    return {name: value.numpy() for name, value in found.items()}


@pytest.mark.parametrize(("exact_classes", "samples"), [(16, None), (2, 9), (16, 3)])  # 3: an idle process
def test_fisher__processes_do_not_matter(images: Path, exact_classes: int, samples: int | None) -> None:
    alone = run_ranks(_found, 1, images, exact_classes, samples)[0]
    for found in run_ranks(_found, 2, images, exact_classes, samples):
        for name, value in alone.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)


# -- the average --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 3, 3), ()])
def test_fisher_average__is_the_minimum_of_the_weighted_distance(shape: tuple[int, ...]) -> None:
    """Where the slope of ``sum_i s_i F_i (theta - theta_i)^2`` is 0."""
    random = np.random.default_rng(3)
    models = [random.normal(size=shape).astype(np.float32) for _ in range(3)]
    fishers = [random.exponential(size=shape) for _ in range(3)]
    shares = (0.5, 0.2, 0.3)
    found = fisher_average(models, fishers, shares)
    assert found.shape == shape
    slope = sum(s * f * (found - m) for s, f, m in zip(shares, fishers, models))
    np.testing.assert_allclose(slope, 0, atol=1e-12)


def test_fisher_average__special_cases() -> None:
    random = np.random.default_rng(0)
    models = [random.normal(size=50) for _ in range(3)]
    shares = (0.5, 0.2, 0.3)
    plain = plain_average(models, shares)
    same = [np.full(50, 1e-9)] * 3
    np.testing.assert_allclose(fisher_average(models, same, shares), plain, rtol=1e-12)
    np.testing.assert_array_equal(fisher_average(models, [np.zeros(50)] * 3, shares), plain)
    np.testing.assert_array_equal(fisher_average(models, [np.full(50, 1e-40)] * 3, shares), plain)
    only_second = [np.zeros(50), np.full(50, 1e-12), np.zeros(50)]
    np.testing.assert_allclose(fisher_average(models, only_second, shares), models[1], rtol=1e-12)
    np.testing.assert_array_equal(
        fisher_average([models[0]] * 3, [abs(m) for m in models], shares), models[0]
    )


def test_fisher_average__piece_by_piece() -> None:
    random = np.random.default_rng(0)
    models, fishers = random.normal(size=(2, 40)), random.exponential(size=(2, 40))
    whole = fisher_average(list(models), list(fishers), (0.4, 0.6))
    pieces = [
        fisher_average(list(models[:, part]), list(fishers[:, part]), (0.4, 0.6))
        for part in (slice(0, 13), slice(13, 40))
    ]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_normalised__has_length_one_and_keeps_zero() -> None:
    found = normalised({"a": torch.tensor([3.0, 0.0]).double(), "b": torch.tensor([[4.0]]).double()})
    assert found["a"].tolist() == [0.6, 0.0]
    assert found["b"].tolist() == [[0.8]]
    assert normalised({"a": torch.zeros(2)})["a"].tolist() == [0.0, 0.0]
