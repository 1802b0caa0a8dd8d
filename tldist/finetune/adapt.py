"""Adaptation inside a fine-tuning: its method, what learns beside the model, the batches of both domains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from tldist.adaptation.methods import METHODS, Method
from tldist.adaptation.network import Adapting
from tldist.adaptation.recipe import AdaptRecipe
from tldist.data.loader import Batch
from tldist.data.order import seed_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import RecipeError
from tldist.finetune.inputs import Inputs
from tldist.finetune.recipe import FinetuneRecipe
from tldist.methods import find_method
from tldist.models.blocks import Block
from tldist.models.heads import find_head, head_outputs, head_width
from tldist.training.transfer import Transfer


@dataclass(frozen=True)
class Adaptation:
    """How a fine-tuning adapts.

    Attributes:
        method, settings: what it does.
        target: images without labels.
        auxiliary: what learns beside the model, on the device; None: nothing does.
    """

    method: Method
    settings: AdaptRecipe
    target: Domain
    auxiliary: nn.Module | None

    @property
    def weight(self) -> float:
        """The highest weight of the method's loss."""
        return self.method.weight if self.settings.weight is None else self.settings.weight

    def wrap(self, runs: nn.Module, model: nn.Module) -> nn.Module:
        """The part of the model that runs in each step, so that it sees both domains."""
        return Adapting(
            runs,
            find_head(model)[1],
            self.auxiliary,
            reverses_target=self.method.reverses_target,
            apart=self.settings.batchnorm == "apart",
        )

    def transfer(self, team: Team, total_samples: int) -> Transfer:
        """For the loop.

        Args:
            team: the processes.
            total_samples: of the whole training.
        """
        return Transfer(self.method, self.settings, team, self.weight, lambda done: done / total_samples)


def find_adaptation(name: str) -> Method:
    """The method of a name, or of one's own function.

    Raises:
        RecipeError: there is none.
    """
    if name == "adabn":
        return Method(lambda pair: pair.target.logits.sum() * 0)  # no training: see `tldist.finetune.adapted`
    return find_method(name, METHODS, Method)


def build_adaptation(
    recipe: FinetuneRecipe, inputs: Inputs, learning: Iterable[list[Block]], head: Block
) -> Adaptation | None:
    """What adapts, if anything; what learns beside the model starts by the seed alone.

    Raises:
        RecipeError: the method is unknown, or does nothing with what learns here.
    """
    if inputs.target is None:
        return None
    settings, name = recipe.adapt, recipe.adapt.method
    assert name is not None
    method, layer = find_adaptation(name), find_head(inputs.start.model)[1]
    if method.moves_features and all(blocks == [head] for blocks in learning):
        raise RecipeError(
            f"adapt.method={name} changes the features, and train={recipe.train} leaves them as they are. "
            f"Use train=last:N or all, or adapt.method=mcc or bnm."
        )
    if method.reverses_target and not isinstance(layer, nn.Linear):
        raise RecipeError(f"adapt.method={name} needs a model whose head is a linear layer.")
    auxiliary = None
    if method.auxiliary is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of("auxiliary", recipe.seed))
            auxiliary = method.auxiliary(head_width(layer), head_outputs(layer), settings)
    return Adaptation(method, settings, inputs.target, auxiliary)


def candidate_steps(count: int, epochs: int, epoch_steps: int) -> dict[int, int]:
    """Epochs (counted from 1) whose end may become the result, with the steps done by then.

    Args:
        count: how many; spread evenly, the last epoch among them.
        epochs: of the training.
        epoch_steps: steps of one.
    """
    taken = sorted({-(-epochs * place // min(count, epochs)) for place in range(1, min(count, epochs) + 1)})
    return {epoch: epoch * epoch_steps for epoch in taken}


def beside(batches: Iterable[Batch], others: Iterable[Batch]) -> Iterator[Batch]:
    """The batches of two domains as one stream, step by step."""
    for batch, other in zip(batches, others):
        yield replace(batch, beside=other)
