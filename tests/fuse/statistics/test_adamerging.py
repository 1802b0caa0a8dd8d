"""AdaMerging against finite differences of the entropy in float64, with an Adam written out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import make_images
from tests.support_models import SMALL
from tests.support_processes import run_ranks
from tldist import distributed
from tldist.bundle import Task
from tldist.data.loader import load_batches
from tldist.domain import DataRecipe, open_domain
from tldist.errors import Diverged, DomainError
from tldist.fuse.statistics.adamerging import Learned, Learning, entropy, learn_coefficients
from tldist.fuse.statistics.steps import StepImages, plan_parts
from tldist.models.load import input_tensor
from tldist.training.ledger import Ledger


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"a": 14, "b": 13, "c": 13})


class AsDouble(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.double()


def net(seed: int, *, batchnorm: bool = True, double: bool = False, num_classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    middle: nn.Module = nn.BatchNorm2d(6) if batchnorm else nn.Identity()
    layers = [
        nn.Conv2d(3, 6, 6, stride=6, bias=not batchnorm),  # BatchNorm takes a bias out again
        middle,
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, num_classes),
    ]
    nn.init.normal_(layers[-1].weight, std=0.5)
    model = nn.Sequential(*layers).eval()
    return nn.Sequential(AsDouble(), model.double()).eval() if double else model


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def learn(
    folder: Path, learning: Learning, task: Task = "multiclass", *, max_bad: float = 0.2, **options: bool
) -> Learned:
    domain = open_domain(DataRecipe(path=str(folder), max_bad=max_bad))
    base, *models = (net(seed, **options) for seed in range(3))
    return learn_coefficients(
        net(9, **options),
        parameters(base),
        [parameters(model) for model in models],
        SMALL,
        domain,
        distributed.start(),
        Ledger(domain, None),
        learning=learning,
        task=task,
    )


def reference(
    folder: Path, learning: Learning, task: Task, *, batchnorm: bool, valid: np.ndarray | None = None
) -> np.ndarray:
    """Coefficients (models, tensors) by central differences of the entropy and Adam as its paper has it."""
    domain = open_domain(DataRecipe(path=str(folder), max_bad=1.0))
    pixels = next(load_batches(domain, [np.arange(len(domain))], SMALL)).images
    inputs = input_tensor(pixels, SMALL)
    model = net(9, batchnorm=batchnorm, double=True)
    base, *others = (parameters(net(seed, batchnorm=batchnorm, double=True)) for seed in range(3))
    names = list(base)
    for layer in model.modules():
        layer.training = isinstance(layer, nn.BatchNorm2d)

    def mean_entropy(numbers: np.ndarray, parts: list[np.ndarray]) -> float:
        table = np.broadcast_to(numbers, (len(others), len(names)))
        for column, name in enumerate(names):
            merged = base[name].clone()
            for number, other in zip(table[:, column], others):
                merged += number * (other[name] - base[name])
            model.get_parameter(name).data = merged
        total, count = 0.0, 0
        for part in parts:
            chosen = part if valid is None else part[valid[part]]
            answer = model(inputs[chosen]).detach().numpy()
            if task == "multilabel":
                p = 1 / (1 + np.exp(-answer))
                total += (-(p * np.log(p) + (1 - p) * np.log(1 - p))).mean(1).sum()
            else:
                p = np.exp(answer) / np.exp(answer).sum(1, keepdims=True)
                total += -(p * np.log(p)).sum()
            count += len(chosen)
        return total / count

    width = len(names) if learning.by_tensor else 1
    numbers = np.full((len(others), width), learning.scale)
    first, second = np.zeros_like(numbers), np.zeros_like(numbers)
    plans = plan_parts(len(domain), learning.batch_size, learning.part_size, learning.seed, learning.steps)
    for step, parts in enumerate(plans, 1):
        slope = np.zeros_like(numbers)
        for place in np.ndindex(numbers.shape):
            shift = np.zeros_like(numbers)
            shift[place] = 1e-5
            slope[place] = (
                mean_entropy(numbers + shift, parts) - mean_entropy(numbers - shift, parts)
            ) / 2e-5
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        numbers = numbers - learning.lr * (first / (1 - 0.9**step)) / (
            np.sqrt(second / (1 - 0.999**step)) + 1e-8
        )
    return np.broadcast_to(numbers, (len(others), len(names)))


def table(learned: Learned) -> np.ndarray:
    return np.array(list(learned.coefficients.values())).T


FEW = Learning(steps=4, lr=0.05, batch_size=20, part_size=7, seed=2)


@pytest.mark.parametrize("batchnorm", [True, False])
@pytest.mark.parametrize("by_tensor", [True, False])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_adamerging__equals_finite_differences_and_adam_written_out(
    images: Path, batchnorm: bool, by_tensor: bool, task: Task
) -> None:
    learning = Learning(
        steps=4, lr=0.01, batch_size=17, part_size=7, seed=2, by_tensor=by_tensor
    )  # of 14, 13
    found = learn(images, learning, task, batchnorm=batchnorm, double=True)
    expected = reference(images, learning, task, batchnorm=batchnorm)
    names = [name for name, _ in net(0, batchnorm=batchnorm, double=True).named_parameters()]
    assert list(found.coefficients) == names
    np.testing.assert_allclose(table(found), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(table(found) - 0.3).max() > 0.02
    assert (np.ptp(table(found), axis=1) > 0.005).all() == by_tensor


def test_adamerging__in_float32_equals_float64(images: Path) -> None:
    narrow, wide = learn(images, FEW), learn(images, FEW, double=True)
    np.testing.assert_allclose(table(narrow), table(wide), atol=2e-4)
    np.testing.assert_allclose(narrow.entropies, wide.entropies, rtol=1e-4)


def test_adamerging__lowers_the_entropy_and_says_what_it_was(images: Path) -> None:
    found = learn(images, Learning(steps=40, lr=0.02, batch_size=40, part_size=40))
    assert found.steps == found.kept == len(found.entropies) == len(found.shares) == 40
    assert found.entropies[-1] < 0.9 * found.entropies[0]
    assert not found.collapsed


def test_adamerging__no_step_leaves_the_scale(images: Path) -> None:
    found = learn(images, Learning(steps=1, lr=0.0, scale=0.7))
    assert set(found.coefficients.values()) == {(0.7, 0.7)}


def test_adamerging__the_model_stays_as_it_was(images: Path) -> None:
    model, domain = net(9), open_domain(images)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base, other = parameters(net(0)), parameters(net(1))
    kept = {name: tensor.clone() for name, tensor in base.items()}
    learn_coefficients(
        model.train(), base, [other], SMALL, domain, distributed.start(), Ledger(domain, None), learning=FEW
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_adamerging__agreed_layers_keep_their_statistics(images: Path) -> None:
    model, domain = net(9), open_domain(images)
    model[1].running_var.fill_(9.0)
    options = (parameters(net(0)), [parameters(net(1))], SMALL, domain, distributed.start())
    kept = learn_coefficients(model, *options, Ledger(domain, None), learning=FEW, agreed={"1"})
    free = learn_coefficients(model, *options, Ledger(domain, None), learning=FEW)
    assert abs(kept.entropies[0] - free.entropies[0]) > 0.01


# -- what one must not notice -------------------------------------------------------------------------------


def _found(folder: Path, double: bool, learning: Learning) -> tuple[np.ndarray, list[float], list[float]]:
    found = learn(folder, learning, double=double)
    return table(found), found.entropies, found.shares


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("ranks", [2, 3])
def test_adamerging__processes_do_not_matter(images: Path, double: bool, ranks: int) -> None:
    alone = run_ranks(_found, 1, images, double, FEW)[0]
    for found in run_ranks(_found, ranks, images, double, FEW):
        np.testing.assert_allclose(found[0], alone[0], atol=1e-9)
        np.testing.assert_allclose(found[1], alone[1], rtol=1e-9)
        assert found[2] == alone[2]


def test_adamerging__a_process_without_parts(images: Path) -> None:
    learning = Learning(steps=3, lr=0.05, batch_size=40, part_size=40)
    alone = run_ranks(_found, 1, images, True, learning)[0]
    for found in run_ranks(_found, 2, images, True, learning):
        np.testing.assert_allclose(found[0], alone[0], atol=1e-9)


def test_adamerging__images_that_do_not_fit_are_decoded_again(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = learn(images, FEW)
    assert "again" not in capsys.readouterr().out
    again = learn(images, Learning(steps=4, lr=0.05, batch_size=20, part_size=7, seed=2, memory_bytes=0))
    assert "decoded again in every epoch" in capsys.readouterr().out
    assert again == kept


def test_adamerging__broken_images_are_left_out(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"a": 10, "b": 10})
    for name in ("a/3.png", "b/7.png"):
        (folder / name).write_bytes(b"broken")
    domain = open_domain(folder)
    valid = np.array([domain.id(i) not in ("a/3.png", "b/7.png") for i in range(len(domain))])
    assert valid.sum() == 18
    learning = Learning(steps=3, lr=0.05, batch_size=10, part_size=5)
    expected = reference(folder, learning, "multiclass", batchnorm=True, valid=valid)
    for memory in (0, 1 << 30):
        found = learn(
            folder,
            Learning(steps=3, lr=0.05, batch_size=10, part_size=5, memory_bytes=memory),
            double=True,
        )
        np.testing.assert_allclose(table(found), expected, rtol=1e-5, atol=1e-6)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"broken")
    with pytest.raises(DomainError, match="no batch"):
        learn(folder, learning, max_bad=1.0)
    with pytest.raises(DomainError, match="broken"):
        learn(folder, learning)


@pytest.mark.parametrize(("size", "batch", "part", "steps"), [(23, 8, 3, 7), (5, 64, 32, 4), (8, 8, 8, 1)])
def test_plan_parts__every_epoch_has_every_position_once(
    size: int, batch: int, part: int, steps: int
) -> None:
    plans = plan_parts(size, batch, part, seed=1, steps=steps)
    assert len(plans) == steps
    sizes = [len(p) for parts in plans for p in parts]
    assert max(sizes) <= part
    assert all(sum(map(len, parts)) <= batch for parts in plans)
    per_epoch = -(-size // batch)
    whole = [np.concatenate(parts) for parts in plans]
    for start in range(0, steps - per_epoch + 1, per_epoch):
        epoch = np.concatenate(whole[start : start + per_epoch])
        assert sorted(epoch.tolist()) == list(range(size))
    if steps >= 2 * per_epoch > 2:
        assert not np.array_equal(whole[0], whole[per_epoch])


def test_step_images__are_the_domains(images: Path) -> None:
    domain, team = open_domain(images), distributed.start()
    plans = plan_parts(len(domain), 9, 4, seed=0, steps=6)
    for memory in (0, 1 << 30):
        steps = StepImages(SMALL, domain, team, Ledger(domain, None), plans, 0, memory)
        for number, parts in enumerate(plans):
            expected = [batch.images for batch in load_batches(domain, parts, SMALL)]
            found = steps.of(number)
            assert len(found) == len(expected)
            assert all(torch.equal(a, b) for a, b in zip(found, expected))


# -- collapse -----------------------------------------------------------------------------------------------


def everything(folder: Path) -> Tensor:
    domain = open_domain(folder)
    return input_tensor(next(load_batches(domain, [np.arange(len(domain))], SMALL)).images, SMALL)


def _towards_one_class(folder: Path) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]:
    """A base that tells images apart without being sure, and a model that adds certainty of class 0."""
    model = net(0, batchnorm=False)
    base = parameters(model)
    base["5.weight"] *= 2  # in place: these are the model's own
    base["5.bias"] -= model(everything(folder)).detach().mean(0)
    other = {name: tensor.clone() for name, tensor in base.items()}
    other["5.bias"] = base["5.bias"] + torch.tensor([2.0, 0.0, 0.0])
    return model, base, other


def _collapse(folder: Path, learning: Learning) -> Learned:
    model, base, other = _towards_one_class(folder)
    domain = open_domain(folder)
    return learn_coefficients(
        model, base, [other], SMALL, domain, distributed.start(), Ledger(domain, None), learning=learning
    )


@pytest.mark.parametrize("batch_size", [40, 10])
def test_adamerging__a_collapse_ends_it_and_is_taken_back(
    images: Path, capsys: pytest.CaptureFixture[str], batch_size: int
) -> None:
    learning = Learning(steps=300, lr=0.02, scale=0.2, batch_size=batch_size, part_size=20)
    found = _collapse(images, learning)
    assert found.collapsed
    assert found.kept < found.steps < 300
    assert found.shares[-1] == 1.0
    assert "one answer" in capsys.readouterr().err
    # The kept coefficients still tell the images apart, and are no worse than the start.
    model, base, other = _towards_one_class(images)
    merged = {name: base[name] + found.coefficients[name][0] * (other[name] - base[name]) for name in base}
    model.load_state_dict(merged)
    answers = Counter(model(everything(images)).argmax(1).tolist())
    assert max(answers.values()) < 40
    assert found.entropies[found.kept] <= found.entropies[0]


def test_adamerging__a_target_of_one_answer_is_no_collapse(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _collapse(images, Learning(steps=3, lr=0.02, scale=2.0, batch_size=40))
    assert not found.collapsed
    assert found.steps == 3
    assert "would not be noticed" in capsys.readouterr().err


def test_adamerging__an_entropy_that_is_not_finite(images: Path) -> None:
    with pytest.raises(Diverged, match="not finite"):
        learn(images, Learning(steps=2, scale=float("inf")))


def test_entropy__of_certain_and_of_open_answers() -> None:
    certain, opened = torch.tensor([[300.0, 0.0, -300.0]]), torch.zeros(1, 3)
    torch.testing.assert_close(entropy(certain, "multiclass"), torch.zeros(1))
    torch.testing.assert_close(entropy(opened, "multiclass"), torch.tensor([np.log(3)]).float())
    torch.testing.assert_close(entropy(opened, "multilabel"), torch.tensor([np.log(2)]).float())
    assert abs(float(entropy(certain, "multilabel")) - np.log(2) / 3) < 1e-6
