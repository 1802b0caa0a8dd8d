"""REPAIR: the repaired net has its parents' statistics, as measured in float64 without any of our code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import make_images
from tests.support_models import SMALL, lively_model
from tests.support_processes import run_ranks
from tldist import distributed
from tldist.data.loader import load_batches
from tldist.domain import open_domain
from tldist.errors import ModelError
from tldist.fuse.statistics.repair import (
    Statistics,
    channel_statistics,
    check_repairable,
    mean_statistics,
    repair,
    repairable_layers,
)
from tldist.fuse.statistics.walk import Walk
from tldist.models.load import input_tensor
from tldist.training.ledger import Ledger

SHARES = (0.3, 0.7)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"a": 12, "b": 11, "c": 9})


class Mixed(nn.Module):
    """Strides, groups, dilation, a branch, channels last, a layer without bias, one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2)
        self.grouped = nn.Conv2d(8, 12, 3, groups=4, padding=1)
        self.bare = nn.Conv2d(12, 12, 1, bias=False)
        self.dilated = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.norm = nn.GroupNorm(3, 12)
        self.last = nn.Linear(12, 10)
        self.twice = nn.Linear(10, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.grouped(self.first(images).relu()).relu()
        x = self.norm(x + self.dilated(self.bare(x)).relu())
        x = self.last(x.permute(0, 2, 3, 1)).relu()
        return self.head(self.twice(self.twice(x)).mean((1, 2)))


def plain_net() -> nn.Module:
    """Conv and linear layers, ReLU in place, as VGG and AlexNet have them."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(4),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(32, 3),
    )


NETS = {"plain": plain_net, "mixed": Mixed}


def make(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = NETS[name]()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0.1, 0.3)
    return model.eval()


def average_of(models: list[nn.Module], name: str) -> nn.Module:
    merged = make(name, 9)
    states = [model.state_dict() for model in models]
    merged.load_state_dict(
        {key: sum(share * state[key] for share, state in zip(SHARES, states)) for key in states[0]}
    )
    return merged


def statistics(model: nn.Module, folder: Path, batch_size: int = 64) -> Statistics:
    domain, team = open_domain(folder), distributed.start()
    return channel_statistics(
        model, SMALL, domain, team, Ledger(domain, None), walk=Walk(batch_size=batch_size)
    )


def everything(folder: Path) -> Tensor:
    domain = open_domain(folder)
    return input_tensor(next(load_batches(domain, [np.arange(len(domain))], SMALL)).images, SMALL)


def by_hooks(model: nn.Module, folder: Path, paths: list[str]) -> dict[str, np.ndarray]:
    """Mean and deviation of the channels over all images at once, in float64 by NumPy."""
    seen: dict[str, np.ndarray] = {}
    model = model.double()
    for path in paths:

        def keep(module: nn.Module, _: object, output: Tensor, path: str = path) -> None:
            axis = 1 if isinstance(module, nn.Conv2d) else output.dim() - 1
            seen[path] = np.moveaxis(output.detach().numpy().copy(), axis, -1).reshape(-1, output.shape[axis])

        model.get_submodule(path).register_forward_hook(keep)
    model(everything(folder).double())
    return {path: np.stack([values.mean(0), values.std(0)]) for path, values in seen.items()}


PATHS = {"plain": ["0", "3", "5", "9"], "mixed": ["first", "grouped", "dilated", "last"]}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_channel_statistics__equal_those_in_float64(images: Path, name: str, batch_size: int) -> None:
    found = statistics(make(name, 1), images, batch_size)
    assert list(found) == PATHS[name]
    for path, expected in by_hooks(make(name, 1), images, PATHS[name]).items():
        assert found[path].dtype == torch.float64
        np.testing.assert_allclose(found[path].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_channel_statistics__a_mean_large_against_the_deviation(images: Path, offset: float) -> None:
    model = make("plain", 1)
    expected = statistics(model, images)["0"]
    with torch.no_grad():
        model[0].bias += offset
    found = statistics(model, images, 3)["0"]
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(found[0], expected[0] + offset, rtol=1e-5, atol=1e-5)


def repaired(name: str, folder: Path, batch_size: int) -> tuple[nn.Module, Statistics, object]:
    parents = [make(name, seed) for seed in (1, 2)]
    goals = mean_statistics([statistics(parent, folder) for parent in parents], SHARES)
    merged, domain, team = average_of(parents, name), open_domain(folder), distributed.start()
    walk = Walk(batch_size=batch_size)
    done = repair(merged, goals, SMALL, domain, team, Ledger(domain, None), walk=walk)
    return merged, goals, done


@pytest.mark.parametrize("name", NETS)
def test_repair__the_repaired_net_has_the_mean_of_the_parents_statistics(images: Path, name: str) -> None:
    parents = [by_hooks(make(name, seed), images, PATHS[name]) for seed in (1, 2)]
    before = by_hooks(average_of([make(name, seed) for seed in (1, 2)], name), images, PATHS[name])
    model, _, done = repaired(name, images, 64)
    after = by_hooks(model, images, PATHS[name])
    assert done.layers == tuple(PATHS[name])
    for path in PATHS[name]:
        expected = SHARES[0] * parents[0][path] + SHARES[1] * parents[1][path]
        np.testing.assert_allclose(after[path], expected, rtol=1e-3, atol=1e-4, err_msg=path)
        assert np.abs(before[path] - expected).max() > 0.05


@pytest.mark.parametrize("name", NETS)
def test_repair__batches_come_close(images: Path, name: str) -> None:
    model, goals, _ = repaired(name, images, 11)
    after = by_hooks(model, images, PATHS[name])
    before = by_hooks(average_of([make(name, seed) for seed in (1, 2)], name), images, PATHS[name])
    for path in PATHS[name]:
        wrong = np.abs(after[path] - goals[path].numpy()).mean()
        assert wrong < 0.3 * np.abs(before[path] - goals[path].numpy()).mean()


def test_repair__equals_batchnorm_layers_put_behind_each_and_folded_by_torch(images: Path) -> None:
    """By another route: real BatchNorm layers in training mode, then torch's own fusion."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

    model, goals, _ = repaired("plain", images, 64)
    layers = list(average_of([make("plain", seed) for seed in (1, 2)], "plain"))
    norms: dict[str, nn.Module] = {}
    for path in PATHS["plain"]:
        conv = isinstance(layers[int(path)], nn.Conv2d)
        kind = nn.BatchNorm2d if conv else nn.BatchNorm1d
        norms[path] = kind(goals[path].shape[1], eps=1e-12, momentum=1.0).train()
        norms[path].load_state_dict({"bias": goals[path][0], "weight": goals[path][1]}, strict=False)
    x = everything(images)
    for number, layer in enumerate(layers):
        x = layer(x)
        if str(number) in norms:
            x = norms[str(number)](x)
            count = x.numel() / x.shape[1]
            norms[str(number)].running_var *= (count - 1) / count  # kept unbiased, used as it is
    for path, norm in norms.items():
        conv = isinstance(layers[int(path)], nn.Conv2d)
        fused = (fuse_conv_bn_eval if conv else fuse_linear_bn_eval)(layers[int(path)].eval(), norm.eval())
        layers[int(path)] = fused
    expected = nn.Sequential(*layers).eval()(everything(images))
    torch.testing.assert_close(model(everything(images)), expected, rtol=1e-3, atol=1e-3)


def test_repair__goals_that_are_met_change_nothing(images: Path) -> None:
    model, domain = make("mixed", 1), open_domain(images)
    expected = model(everything(images))
    goals, team = statistics(model, images), distributed.start()
    repair(model, goals, SMALL, domain, team, Ledger(domain, None), walk=Walk())
    torch.testing.assert_close(model(everything(images)), expected, rtol=1e-3, atol=1e-4)


def test_repair__what_is_left_out_is_said_and_not_touched(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = average_of([make("mixed", seed) for seed in (1, 2)], "mixed")
    model, _, done = repaired("mixed", images, 64)
    assert set(done.left_out) == {"bare", "twice"}
    assert "no bias" in done.left_out["bare"]
    assert "several times" in done.left_out["twice"]
    said = capsys.readouterr().err
    assert "REPAIR leaves out bare" in said
    assert "REPAIR leaves out twice" in said
    for path in ("bare", "twice", "head", "norm"):
        for key, tensor in model.get_submodule(path).state_dict().items():
            assert torch.equal(tensor, merged.get_submodule(path).state_dict()[key])


def test_repair__a_constant_channel_is_only_shifted(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, domain, team = make("plain", 1), open_domain(images), distributed.start()
    goals = statistics(make("plain", 2), images)
    with torch.no_grad():
        model[3].weight[5] *= 1e-6
    done = repair(model, goals, SMALL, domain, team, Ledger(domain, None), walk=Walk())
    assert done.constant_channels == 1
    assert "1 channels" in capsys.readouterr().err
    found = by_hooks(model, images, ["3"])["3"]
    assert found[1, 5] < 1e-4
    np.testing.assert_allclose(found[0], goals["3"][0].numpy(), rtol=1e-3, atol=1e-4)


def test_repair__a_channel_that_is_dead_in_all_parents_is_dead(images: Path) -> None:
    parent = make("plain", 2)
    with torch.no_grad():
        parent[3].weight[5] = 0
    goals = statistics(parent, images)
    model, domain, team = make("plain", 1), open_domain(images), distributed.start()
    done = repair(model, goals, SMALL, domain, team, Ledger(domain, None), walk=Walk())
    assert done.constant_channels == 0
    found = by_hooks(model, images, ["3", "5"])
    assert found["3"][1, 5] < 1e-6
    np.testing.assert_allclose(found["5"], goals["5"].numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["vgg11", "alexnet", "squeezenet1_1"])
def test_repairable_layers__of_the_zoo(name: str) -> None:
    from torchvision import models

    with torch.device("meta"):
        model = getattr(models, name)(num_classes=4)
    check_repairable(model)
    taken, left_out = repairable_layers(model)
    expected = [path for path, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))][:-1]
    assert list(taken) == expected
    assert not left_out


def test_repair__refuses_what_it_does_not_fit(images: Path) -> None:
    from torchvision.models import VisionTransformer, swin_t

    with pytest.raises(ModelError, match="BatchNorm"):
        check_repairable(lively_model("resnet18", 3))
    with pytest.raises(ModelError, match="attention"):
        check_repairable(VisionTransformer(32, 8, 1, 2, 16, 32))
    with torch.device("meta"), pytest.raises(ModelError, match="attention"):
        check_repairable(swin_t())
    domain = open_domain(images)
    with pytest.raises(ModelError, match="no layer"):
        repair(make("plain", 1), {}, SMALL, domain, distributed.start(), Ledger(domain, None), walk=Walk())


def _found(folder: Path, batch_size: int) -> dict[str, np.ndarray]:
    model, goals, _ = repaired("mixed", folder, batch_size)
    tensors = {**model.state_dict(), **{f"goal {path}": goal for path, goal in goals.items()}}
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("batch_size", [9, 64])  # 64: an idle process
def test_repair__processes_do_not_matter(images: Path, batch_size: int) -> None:
    alone = run_ranks(_found, 1, images, batch_size)[0]
    for found in run_ranks(_found, 2, images, batch_size):
        for name, tensor in alone.items():
            np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)
