"""The phases of a fine-tuning: what learns from which epoch on."""

from __future__ import annotations

from dataclasses import dataclass

from tldist.errors import RecipeError
from tldist.finetune.recipe import FinetuneRecipe


@dataclass(frozen=True)
class Phase:
    """Epochs in which the same parameters learn; the optimiser starts afresh with each.

    Attributes:
        first_epoch, last_epoch: of the phase; the last is not part of it.
        train: what learns.
        lr: the highest learning rate.
        schedule_first, schedule_last: epochs over which the learning rate's schedule runs.
    """

    first_epoch: int
    last_epoch: int
    train: str
    lr: float
    schedule_first: int
    schedule_last: int


def total_epochs(recipe: FinetuneRecipe) -> int:
    """Epochs of the whole run, the probe included."""
    return recipe.probe.epochs + recipe.epochs


def plan_phases(recipe: FinetuneRecipe) -> list[Phase]:
    """The phases in order: the probe, then fine-tuning, cut where more is unfrozen.

    Raises:
        RecipeError: unfreezing epochs out of order or after the end.
    """
    probe, end = recipe.probe.epochs, total_epochs(recipe)
    phases = [Phase(0, probe, "head", recipe.probe.lr, 0, probe)] if probe else []
    entries = [entry.partition(":") for entry in recipe.unfreeze]
    starts = [(0, recipe.train), *((int(epoch), what) for epoch, _, what in entries)]
    if starts[1:] and starts[1][0] == 0:
        starts = starts[1:]
    epochs = [epoch for epoch, _ in starts]
    if sorted(set(epochs)) != epochs or epochs[-1] >= recipe.epochs:
        raise RecipeError(
            f"unfreeze={','.join(recipe.unfreeze)}: epochs must rise and lie below epochs={recipe.epochs}."
        )
    ends = [*epochs[1:], recipe.epochs]
    return phases + [
        Phase(probe + first, probe + last, what, recipe.optimizer.lr, probe, end)
        for (first, what), last in zip(starts, ends)
    ]
