"""Activation matching: the order of a model's units in which they answer images as another model's do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.func import functional_call

from tldist.data.loader import load_batches
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError, ModelError
from tldist.fuse.rebasin.spec import Group, Permutations, Spec, Tap, unit_rows
from tldist.models.load import input_tensor
from tldist.progress import progress_bar, warn
from tldist.runtime.preprocess import Preprocessing
from tldist.training.batchnorm import even_batches
from tldist.training.ledger import Ledger

_Watched = dict[tuple[str, Tap], list[Tensor]]
"""For the name of a group and one of its taps, (size, M) for each time that the module has run."""


@torch.no_grad()
def match_activations(
    model: nn.Module,
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    spec: Spec,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    batch_size: int = 64,
    seed: int = 0,
    workers: int = 0,
    most_batches: int | None = None,
) -> Permutations:
    """The permutations of ``other`` whose units answer images as those of ``reference`` do; by all processes.

    Section 3.1 of arXiv:2209.04836, with correlations in the place of inner products, so that no unit counts
    for its scale: both models see the same images, every unit of one is correlated with every unit of the
    other over images and positions, and one linear assignment a group maximises the sum. Units are watched
    where a linear or convolution layer puts them out and where one reads them (a unit whose ReLU never
    opens says nothing there), and the correlations are added. Heads of attention are compared by their
    attention maps. Sums are float64, over whole batches, so that the number of processes does not matter.

    Args:
        model: of the architecture, on the team's device; its own weights are not used.
        reference, other: tensors of two models by name.
        spec: of the architecture.
        how: the preprocessing.
        domain: the images; labels are not read.
        team: the processes; each computes whole batches.
        ledger: takes the broken images.
        batch_size, seed: of `even_batches`.
        workers: decoding processes.
        most_batches: use the first so many.

    Returns:
        For `permute`, of ``other``; the same on every process.

    Raises:
        DomainError: no image can be decoded, or too many are broken.
        ModelError: an activation is not finite.
    """
    model.eval()
    models = [on_model(model, tensors) for tensors in (reference, other)]
    plans = even_batches(len(domain), batch_size, seed)[:most_batches]
    sums = {(group.name, tap): _Sums(group.size) for group in spec.groups for tap in group.taps}
    with (
        watching(model, spec) as watched,
        progress_bar(sum(map(len, plans)), "img", "match activations", keep=False) as bar,
    ):
        for batch in load_batches(domain, plans[team.rank :: team.size], how, workers=workers):
            ledger.add(batch.broken)
            bar.update(len(batch.indices) * team.size)
            images = batch.images[batch.valid]
            if len(images):
                inputs = input_tensor(images.to(team.device), how)
                mine, theirs = (_answers(model, tensors, inputs, watched) for tensors in models)
                for key, rows in mine.items():
                    sums[key].add(torch.cat(rows, 1), torch.cat(theirs[key], 1))
    ledger.settle(team)
    for total in sums.values():
        total.reduce(team)
    if not any(total.count for total in sums.values()):
        raise DomainError(f"{domain.name}: no image that can be decoded, so no activations to match.")
    return {group.name: _order(group, sums) for group in spec.groups}


def on_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in the types and on the device of a model's own of the same names."""
    return {name: tensors[name].to(own) for name, own in model.state_dict().items()}


def _answers(model: nn.Module, tensors: dict[str, Tensor], inputs: Tensor, watched: _Watched) -> _Watched:
    watched.clear()
    functional_call(model, tensors, (inputs,), tie_weights=False)
    return dict(watched)


class _Sums:
    """Sums over samples from which correlations of two models' units are computed.

    Args:
        size: units of each model.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        # count, the sums and sums of squares of both models' units, and their products
        self.values = torch.zeros(1 + 4 * size + size * size, dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many samples have been added."""
        return int(self.values[0])

    def add(self, mine: Tensor, theirs: Tensor) -> None:
        """Add samples: two of (size, M)."""
        mine, theirs = mine.double(), theirs.double()
        count = mine.new_tensor([mine.shape[1]])
        moments = [mine.sum(1), theirs.sum(1), mine.square().sum(1), theirs.square().sum(1)]
        self.values = self.values.to(mine.device)
        self.values += torch.cat([count, *moments, (mine @ theirs.T).reshape(-1)])

    def reduce(self, team: Team) -> None:
        """Add up those of all processes."""
        self.values = team.sum(self.values.to(team.device)).cpu()

    def correlations(self) -> np.ndarray:
        """(size, size): rows: the first model's units. 0 where a unit gives the same on all samples."""
        count, *rest = self.values.split([1, *[self.size] * 4, self.size**2])
        mean_a, mean_b, square_a, square_b, products = (value / count for value in rest)
        covariance = products.view(self.size, self.size) - mean_a[:, None] * mean_b
        spread_a, spread_b = (
            # what rounding leaves of a constant is no spread
            torch.where(variance > 1e-12 * square, variance, torch.inf).sqrt()
            for variance, square in ((square_a - mean_a**2, square_a), (square_b - mean_b**2, square_b))
        )
        return (covariance / (spread_a[:, None] * spread_b)).numpy()


def _order(group: Group, sums: Mapping[tuple[str, Tap], _Sums]) -> np.ndarray:
    """The assignment of one group, by the sum of its taps' correlations."""
    counted = [sums[group.name, tap] for tap in group.taps if sums[group.name, tap].count]
    if not counted:
        warn(f"the activations of {group.name} cannot be watched: its units keep their order")
        return np.arange(group.size)
    scores = np.sum([total.correlations() for total in counted], axis=0)
    if not np.isfinite(scores).all():
        raise ModelError(f"the activations of {group.name} hold NaN or infinity: they cannot be matched.")
    order: np.ndarray = linear_sum_assignment(scores, maximize=True)[1]
    return order


@contextmanager
def watching(model: nn.Module, spec: Spec) -> Iterator[_Watched]:
    """While inside, what passes the taps in a forward pass is noted: (size, M) for the units of a group."""
    watched: _Watched = {}
    taps: dict[tuple[str, str], list[tuple[Group, Tap]]] = {}
    for group in spec.groups:
        for tap in group.taps:
            taps.setdefault((tap.module, tap.side), []).append((group, tap))

    def note(value: Tensor, found: list[tuple[Group, Tap]]) -> None:
        for group, tap in found:
            # A copy: layers after this one may work in place.
            rows = unit_rows(value, group.size, tap).clone()
            watched.setdefault((group.name, tap), []).append(rows)

    handles = [
        _hook(model.get_submodule(path), side, lambda value, found=found: note(value, found))
        for (path, side), found in taps.items()
    ]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, side: str, note: Any) -> torch.utils.hooks.RemovableHandle:
    """Call ``note`` with what a module is given, puts out, or attends to, whenever it runs."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        note(args[0])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        note(output)

    def attending(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        # Not through the module's call, whose hooks this is one of.
        maps = {**kwargs, "need_weights": True, "average_attn_weights": False}
        note(module.forward(*args, **maps)[1])

    if side == "input":
        return module.register_forward_pre_hook(before)
    if side == "output":
        return module.register_forward_hook(after)
    return module.register_forward_hook(attending, with_kwargs=True)
