"""REPAIR: layers of a merged network without BatchNorm, scaled and shifted to its parents' statistics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import ModelError
from tldist.fuse.statistics.layers import UNCALLED, Plain, plain_layers, report_left_out
from tldist.fuse.statistics.walk import ChannelSums, Walk, sum_over, walk_images
from tldist.models.heads import find_head
from tldist.models.load import input_tensor
from tldist.progress import warn
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger

Statistics = dict[str, Tensor]
"""Path of a layer to mean and standard deviation of its output channels over images and places, before the
activation: float64 (2, C), on the CPU."""

_LEAST = 1e-3
"""A channel whose deviation is a smaller part of the wanted one is constant, but for noise: not scaled up."""


@dataclass(frozen=True)
class Repaired:
    """What was done.

    Attributes:
        layers: paths of the layers that were changed.
        left_out: path to reason of the other linear and convolution layers.
        constant_channels: channels that were only shifted, as they do not vary.
    """

    layers: tuple[str, ...]
    left_out: dict[str, str]
    constant_channels: int


def check_repairable(model: nn.Module) -> None:
    """Refuse the models that REPAIR does not fit.

    Raises:
        ModelError: BatchNorm, or attention.
    """
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is not None:
            raise ModelError(
                f"the model has BatchNorm layers ({path}, ...): their statistics are re-estimated on data=, "
                f"which is the same repair. Leave repair out."
            )
        if "attention" in type(module).__name__.lower():
            raise ModelError(
                f"repair does not fit a model with attention ({path}, ...): what its queries and keys say "
                f"lies in products of channels, which mean and deviation of each do not describe. Leave "
                f"repair out."
            )


def repairable_layers(model: nn.Module) -> tuple[dict[str, Plain], dict[str, str]]:
    """Layers that can be scaled and shifted, by path; and the others, path to reason. The head is neither."""
    layers, head = plain_layers(model), find_head(model)[0]
    bare = {path for path, layer in layers.found.items() if layer.bias is None}
    left_out = layers.left_out | dict.fromkeys(bare, "it has no bias to take the shift")
    left_out.pop(head, None)
    taken = {path: layer for path, layer in layers.found.items() if path not in bare and path != head}
    return taken, left_out


@torch.no_grad()
def channel_statistics(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    walk: Walk,
) -> Statistics:
    """Mean and deviation of every repairable layer's channels; called by all processes together.

    Args:
        model: a parent, on the team's device, with its channels in the order of the merged model (matched
            ones, where parents are matched first); put into evaluation mode, else unchanged.
        how: its preprocessing.
        domain: the images; labels are not read.
        team: the processes.
        ledger: takes the broken images.
        walk: which images.

    Returns:
        Without the layers that a forward pass does not call exactly once.

    Raises:
        DomainError: too many broken images, or none that can be decoded.
    """
    layers, _ = repairable_layers(model)
    return _measure(model, layers, how, domain, team, ledger, walk, None, "channel statistics")


def mean_statistics(parents: Sequence[Statistics], shares: Sequence[float]) -> Statistics:
    """The means of the parents' means and of their deviations: the goals of arXiv:2211.08403.

    Args:
        parents: of one architecture; layers that one of them lacks are left out.
        shares: one number a parent, of sum 1.
    """
    paths = [path for path in parents[0] if all(path in parent for parent in parents)]
    return {
        path: torch.stack([share * parent[path] for parent, share in zip(parents, shares)]).sum(0)
        for path in paths
    }


@torch.no_grad()
def repair(
    model: nn.Module,
    goals: Statistics,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    walk: Walk,
) -> Repaired:
    """Give the layers of a merged model the wanted statistics: REPAIR, arXiv:2211.08403.

    The output of each layer is measured while the layers before it are normalised by the batch to their
    goals, as a BatchNorm put behind each would do; then scale and shift go into its weight and bias. The
    larger the batches, the better the statistics are met. Called by all processes together; the same for any
    number of them.

    Args:
        model: the merged model, on the team's device; its weights are changed in place.
        goals: of `mean_statistics`.
        how: its preprocessing.
        domain: the images; labels are not read.
        team: the processes.
        ledger: takes the broken images.
        walk: which images; the same as for the parents.

    Raises:
        ModelError: see `check_repairable`; or no layer can be repaired.
        DomainError: too many broken images, or none that can be decoded.
    """
    check_repairable(model)
    layers, left_out = repairable_layers(model)
    uncalled = {path for path in layers if path not in goals}
    left_out |= dict.fromkeys(uncalled, f"{UNCALLED}, or it is called several times")
    layers = {path: layer for path, layer in layers.items() if path not in uncalled}
    if not layers:
        raise ModelError("repair: the model has no layer that can be scaled and shifted. Leave repair out.")
    found = _measure(model, layers, how, domain, team, ledger, walk, goals, "REPAIR")
    report_left_out("REPAIR", left_out)
    constant = sum(_fold(layers[path], found[path], goals[path]) for path in found)
    if constant:
        warn(f"REPAIR: {constant} channels of the merged model do not vary; they are only shifted")
    return Repaired(tuple(found), left_out, constant)


def _scale(deviation: Tensor, wanted: Tensor) -> Tensor:
    """What to multiply channels by."""
    return torch.where(
        deviation > _LEAST * wanted, wanted / deviation.clamp(min=torch.finfo(torch.float64).tiny), 1.0
    )


def _fold(layer: Plain, found: Tensor, wanted: Tensor) -> int:
    """Put scale and shift into weight and bias: exact, as both are linear; returns the constant channels."""
    assert layer.bias is not None
    scale = _scale(found[1], wanted[1])
    weight, bias = layer.weight.double().cpu(), layer.bias.double().cpu()
    layer.weight.copy_(weight * scale.view(-1, *[1] * (weight.dim() - 1)))
    layer.bias.copy_((bias - found[0]) * scale + wanted[0])
    return int(((found[1] <= _LEAST * wanted[1]) & (wanted[1] > 0)).sum())


def _measure(
    model: nn.Module,
    layers: Mapping[str, Plain],
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    walk: Walk,
    goals: Statistics | None,
    label: str,
) -> Statistics:
    """Statistics of layers; with ``goals``, each passes on what has these in the batch."""
    model.eval()
    sums = {path: ChannelSums(len(layer.weight), team.device) for path, layer in layers.items()}
    targets = {path: goal.to(team.device) for path, goal in (goals or {}).items()}
    calls: Counter[str] = Counter()
    passes = 0

    def look(path: str, output: Tensor) -> Tensor | None:
        axis = 1 if isinstance(layers[path], nn.Conv2d) and output.dim() == 4 else -1
        values = output.movedim(axis, -1)
        mean, variance = sums[path].add(values.flatten(0, -2))
        calls[path] += 1
        if goals is None:
            return None
        wanted = targets[path]
        scale = _scale(variance.sqrt(), wanted[1])
        shift = wanted[0] - mean * scale
        return (values * scale.to(output.dtype) + shift.to(output.dtype)).movedim(-1, axis)

    with _outputs(layers, look):
        for images, _ in walk_images(how, domain, team, ledger, walk, label):
            model(input_tensor(images, how))
            passes += 1
    uses = sum_over(team, torch.tensor([passes, *(calls[path] for path in layers)], dtype=torch.float64))
    measured = {path: sums[path].over(team) for path in layers}
    return {
        path: torch.stack([mean, variance.sqrt()])
        for (path, (_, mean, variance)), use in zip(measured.items(), uses[1:])
        if use == uses[0]
    }


@contextmanager
def _outputs(layers: Mapping[str, Plain], look: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """While inside, ``look`` gets the path and the output of every call of a layer, and may replace it."""

    def note(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: object, output: Tensor) -> Tensor | None:
            return look(path, output)

        return layers[path].register_forward_hook(hook)

    handles = [note(path) for path in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
