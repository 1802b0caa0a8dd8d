"""One module that sees two domains: what it says, how BatchNorm behaves, and where gradients are reversed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tldist.adaptation.methods import METHODS, Pair
from tldist.adaptation.network import Adapting, DomainCritic, Said, SecondHead
from tldist.adaptation.recipe import AdaptRecipe


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).double()


def images(count: int, shift: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64) + shift


SOURCE, TARGET = images(5, 0.0, 1), images(3, 2.0, 2)


def test_adapting__together_is_one_batch_of_both() -> None:
    net, plain = network(), network()
    source, target = Adapting(net, net[-1], None)(SOURCE, TARGET, 1.0)
    expected = plain(torch.cat([SOURCE, TARGET]))
    torch.testing.assert_close(source.logits, expected[:5])
    torch.testing.assert_close(target.logits, expected[5:])
    assert source.features.shape == (5, 6)
    torch.testing.assert_close(plain[-1](target.features), target.logits)
    torch.testing.assert_close(net[1].running_mean, plain[1].running_mean)
    assert source.beside.shape == (5, 0)


def test_adapting__apart_normalises_each_and_remembers_the_target() -> None:
    net, first, second = network(), network(), network()
    source, target = Adapting(net, net[-1], None, apart=True)(SOURCE, TARGET, 1.0)
    torch.testing.assert_close(source.logits, first(SOURCE))
    torch.testing.assert_close(target.logits, second(TARGET))
    torch.testing.assert_close(net[1].running_mean, second[1].running_mean)
    torch.testing.assert_close(net[1].running_var, second[1].running_var)
    assert net[1].track_running_stats


def test_adapting__apart_leaves_frozen_batchnorm_alone() -> None:
    net = network()
    net[1].eval()
    before = net[1].running_mean.clone()
    source, _ = Adapting(net, net[-1], None, apart=True)(SOURCE, TARGET, 1.0)
    torch.testing.assert_close(source.logits, net(SOURCE))
    assert torch.equal(net[1].running_mean, before)


def test_adapting__head_is_not_held_twice() -> None:
    net = network()
    names = [name for name, _ in Adapting(net, net[-1], SecondHead(6, 4)).named_parameters()]
    assert sum(name.endswith("weight") for name in names) == 4
    assert not [name for name in names if "_head" in name]


@pytest.mark.parametrize("method", ["dann", "cdan"])
def test_opponent__lowers_what_the_features_raise(method: str) -> None:
    settings = AdaptRecipe.make(method=method, target={"path": "x"}, hidden=7, entropy=False)
    net = network()
    build = METHODS[method].auxiliary
    assert build is not None
    critic = build(6, 4, settings).double()
    plain = copy.deepcopy(net)

    said = Adapting(net, net[-1], critic)(SOURCE, TARGET, 0.3)
    loss = METHODS[method].loss(Pair(said[0], torch.zeros(5, dtype=torch.int64), said[1], settings))
    loss.backward()

    features = plain[:-1](torch.cat([SOURCE, TARGET]))
    answers = plain[-1](features).detach().softmax(1)
    read = features if method == "dann" else torch.einsum("nk,nd->nkd", answers, features).flatten(1)
    scores = critic.layers(read)[:, 0]
    bce = nn.functional.binary_cross_entropy_with_logits
    expected = (bce(scores[:5], torch.ones(5).double()) + bce(scores[5:], torch.zeros(3).double())) / 2
    torch.testing.assert_close(loss, expected)
    raised = torch.autograd.grad(expected, list(plain.parameters()), retain_graph=True, allow_unused=True)
    for (name, parameter), gradient in zip(net.named_parameters(), raised):
        if gradient is None:  # the head: what it says does not learn from the opponent
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, -0.3 * gradient, msg=name)
    for parameter, gradient in zip(critic.parameters(), torch.autograd.grad(expected, critic.parameters())):
        torch.testing.assert_close(parameter.grad, gradient)


def test_mcd__heads_move_apart_and_features_together() -> None:
    settings = AdaptRecipe.make(method="mcd", target={"path": "x"})
    net, labels = network(), torch.tensor([0, 1, 2, 3, 0])
    second = SecondHead(6, 4).double()
    plain = copy.deepcopy(net)
    adapting = Adapting(net, net[-1], second, reverses_target=True)
    said = adapting(SOURCE, TARGET, 0.3)
    METHODS["mcd"].loss(Pair(said[0], labels, said[1], settings)).backward()

    features = plain[:-1](torch.cat([SOURCE, TARGET]))
    one, two = plain[-1](features), second.head(features)
    learned = nn.functional.cross_entropy(two[:5], labels)
    apart = (one[5:].softmax(1) - two[5:].softmax(1)).abs().mean()
    for name, parameter in net.named_parameters():
        sign = -1.0 if name.startswith("5.") else 0.3  # the head raises it, what is below lowers it
        expected = torch.autograd.grad(
            learned + sign * apart, dict(plain.named_parameters())[name], retain_graph=True
        )[0]
        torch.testing.assert_close(parameter.grad, expected, msg=name)
    for parameter, gradient in zip(
        second.parameters(), torch.autograd.grad(learned - apart, second.parameters())
    ):
        torch.testing.assert_close(parameter.grad, gradient)


def test_critic__random_products_where_there_are_too_many() -> None:
    torch.manual_seed(0)
    wide = DomainCritic(6, 4, 5, 23)
    assert wide.layers[0].in_features == 23
    assert set(dict(wide.named_buffers())) == {"of_features", "of_classes"}, "they are saved"
    narrow = DomainCritic(6, 4, 5, 24)
    assert narrow.layers[0].in_features == 24
    assert not dict(narrow.named_buffers())
    said = Said(torch.randn(3, 4), torch.randn(3, 6), torch.empty(3, 0))
    assert wide(said, 1.0).shape == (3, 1)
