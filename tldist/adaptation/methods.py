"""What adapts, by name: a loss on what the model says of both domains, and what learns beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from tldist.adaptation.adversarial import discrepancy, domain_loss, entropy_weights
from tldist.adaptation.alignment import deep_coral, multi_kernel_mmd
from tldist.adaptation.network import DomainCritic, Said, SecondHead
from tldist.adaptation.predictions import (
    batch_nuclear_norm,
    information_maximisation,
    minimum_class_confusion,
)
from tldist.adaptation.recipe import AdaptRecipe


@dataclass(frozen=True)
class Pair:
    """What the model says of a step's images in both domains, of all processes.

    Attributes:
        source: of the images whose labels are learned; without any where there are none (`SOURCE_FREE`).
        labels: int64 (N,), theirs.
        target: of the target's images.
        settings: of the adaptation.
    """

    source: Said
    labels: Tensor
    target: Said
    settings: AdaptRecipe


Auxiliary = Callable[[int, int, AdaptRecipe], nn.Module]
"""Width of the features, number of classes, settings, to what learns beside the model."""


@dataclass(frozen=True)
class Method:
    """One way to adapt.

    Attributes:
        loss: of a pair; a scalar, the same on all processes.
        auxiliary: builds what learns beside the model, and is no part of the result; None: nothing.
        weight: of the loss, where none is asked for.
        opposes: the weight is that of a reversed gradient inside the model; the loss itself keeps 1.
        reverses_target: the gradient is reversed between features and both heads, for target images.
        moves_features: it does nothing where the head alone learns.
        keeps_head: the head does not learn.
    """

    loss: Callable[[Pair], Tensor]
    auxiliary: Auxiliary | None = None
    weight: float = 1.0
    opposes: bool = False
    reverses_target: bool = False
    moves_features: bool = False
    keeps_head: bool = False


def _critic(features: int, classes: int, settings: AdaptRecipe) -> nn.Module:
    return DomainCritic(features, 0, settings.hidden, settings.random_products)


def _conditional_critic(features: int, classes: int, settings: AdaptRecipe) -> nn.Module:
    return DomainCritic(features, classes, settings.hidden, settings.random_products)


def _second_head(features: int, classes: int, settings: AdaptRecipe) -> nn.Module:
    return SecondHead(features, classes)


def _dann(pair: Pair) -> Tensor:
    return domain_loss(pair.source.beside[:, 0], pair.target.beside[:, 0])


def _cdan(pair: Pair) -> Tensor:
    source, target = pair.source, pair.target
    if not pair.settings.entropy:
        return _dann(pair)
    weights = entropy_weights(source.logits), entropy_weights(target.logits)
    return domain_loss(source.beside[:, 0], target.beside[:, 0], *weights)


def _mcd(pair: Pair) -> Tensor:
    """The second head learns the labels too; both heads move apart on the target, and the features, behind a
    reversed gradient, bring them together (MCD, arXiv:1712.02560, eq. 3-5, in one step as the authors' code
    has it by an option; the paper takes three)."""
    learned = nn.functional.cross_entropy(pair.source.beside, pair.labels, reduction="sum")
    apart = discrepancy(pair.target.logits, pair.target.beside)
    return learned / max(1, len(pair.labels)) - apart


METHODS: dict[str, Method] = {
    "deep_coral": Method(
        lambda pair: deep_coral(pair.source.features, pair.target.features), weight=100.0, moves_features=True
    ),
    "dan": Method(
        lambda pair: multi_kernel_mmd(pair.source.features, pair.target.features), moves_features=True
    ),
    "dann": Method(_dann, _critic, opposes=True, moves_features=True),
    "cdan": Method(_cdan, _conditional_critic, opposes=True, moves_features=True),
    "mcd": Method(_mcd, _second_head, opposes=True, reverses_target=True, moves_features=True),
    "mcc": Method(lambda pair: minimum_class_confusion(pair.target.logits, pair.settings.temperature)),
    "bnm": Method(lambda pair: batch_nuclear_norm(pair.target.logits)),
    "shot": Method(
        lambda pair: information_maximisation(pair.target.logits), keeps_head=True, moves_features=True
    ),
}
"""Losses by name; ``adabn`` has none (`tldist.training.batchnorm`)."""
