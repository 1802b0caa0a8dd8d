"""Many linear probes in one pass over the same features: one for each learning rate and weight decay."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.blocks import Block
from tldist.models.heads import replace_module
from tldist.training.measure import Measurement
from tldist.training.objective import Objective


class Probes(nn.Module):
    """Several heads that read the same features, in the place of one; all start alike.

    Args:
        head: a linear or convolution layer with K outputs.
        count: how many; S.
    """

    def __init__(self, head: nn.Module, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(copy.deepcopy(head) for _ in range(count))

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, D, ...) to outputs (N, S * K, ...), head by head."""
        return torch.cat([head(features) for head in self.heads], 1)


def sweep_settings(recipe: FinetuneRecipe) -> list[tuple[float, float]]:
    """(learning rate, weight decay) of each probe; empty where nothing is swept."""
    if not recipe.sweep.is_on:
        return []
    rates = recipe.sweep.lr or (recipe.optimizer.lr,)
    decays = recipe.sweep.weight_decay or (recipe.optimizer.weight_decay,)
    return [(lr, decay) for lr in rates for decay in decays]


def widen(model: nn.Module, head: Block, count: int) -> None:
    """Put ``count`` copies of the head in its place."""
    replace_module(model, head.name, Probes(model.get_submodule(head.name), count))


def narrow(model: nn.Module, head: Block, chosen: int) -> None:
    """Put the chosen probe back as the head."""
    probes = model.get_submodule(head.name)
    assert isinstance(probes, Probes)
    replace_module(model, head.name, probes.heads[chosen])


def probe_rates(
    recipe: FinetuneRecipe, head: Block, model: nn.Module
) -> tuple[dict[str, float], dict[str, float]]:
    """By parameter name: the multiple of the phase's learning rate, and the weight decay."""
    scales, decays = {}, {}
    for name, _ in model.get_submodule(head.name).named_parameters():
        lr, decay = sweep_settings(recipe)[int(name.split(".")[1])]
        scales[f"{head.name}.{name}"] = lr / recipe.optimizer.lr
        decays[f"{head.name}.{name}"] = decay
    return scales, decays


def one_probe(logits: Tensor, place: int, count: int) -> Tensor:
    """Logits (N, S * K) to those of one probe (N, K)."""
    return logits.unflatten(1, (count, -1))[:, place]


def each_probe(objective: Objective, count: int) -> Objective:
    """The loss of each sample, summed over the probes: each has the gradient of its own loss alone."""

    def summed(logits: Tensor, labels: Tensor) -> Tensor:
        spread = labels.repeat_interleave(count, 0)
        return objective(logits.unflatten(1, (count, -1)).flatten(0, 1), spread).view(-1, count).sum(1)

    return summed


def best_probe(found: list[Measurement]) -> int:
    """The highest score, then the lowest loss, then the first."""
    return max(range(len(found)), key=lambda place: (found[place].score, -found[place].loss, -place))


def sweep_table(recipe: FinetuneRecipe, found: list[Measurement]) -> list[dict[str, Any]]:
    """What each probe reached on validation, best first."""
    rows = [
        {"lr": lr, "weight_decay": decay, "accuracy": measured.score, "loss": measured.loss}
        for (lr, decay), measured in zip(sweep_settings(recipe), found)
    ]
    return sorted(rows, key=lambda row: (-row["accuracy"], row["loss"]))
