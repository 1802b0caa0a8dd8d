"""BatchNorm statistics re-estimated on data, the same for any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tldist.data.loader import Batch, load_batches
from tldist.data.order import epoch_order
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError
from tldist.models.load import input_tensor
from tldist.progress import progress_bar
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger


def batchnorm_layers(model: nn.Module, agreed: Collection[str] = ()) -> list[_BatchNorm]:
    """The BatchNorm layers that keep statistics, but for those at the paths ``agreed``."""
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and path not in agreed
    ]


def even_batches(size: int, batch_size: int, seed: int) -> list[np.ndarray]:
    """All positions 0 .. size - 1 in batches of at most ``batch_size`` whose sizes differ by one at most.

    Shuffled: in natural order a batch would hold one class, and its variance miss what lies between classes.
    Even: statistics of batches are averaged with equal weight.
    """
    order = epoch_order(seed, 0, size)
    return np.array_split(order, -(-size // batch_size))


@torch.no_grad()
def reestimate(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    load: Callable[[Sequence[np.ndarray]], Iterable[Batch]] | None = None,
    most_batches: int | None = None,
    agreed: Collection[str] = (),
) -> int:
    """Replace the statistics of every BatchNorm layer by those of a domain; called by all processes together.

    The mean over batches of each batch's mean and unbiased variance, every layer seeing inputs normalised by
    their batch: what PyTorch keeps with ``momentum=None`` (and ``torch.optim.swa_utils.update_bn``). The rest
    of the model stays in evaluation mode. Sums are kept in float64, so that neither the number of processes
    nor the order of batches matters.

    Args:
        model: on the team's device; changed in place.
        how: its preprocessing.
        domain: the images; labels are not read.
        team: the processes; each computes whole batches.
        ledger: takes the broken images.
        batch_size, seed: of `even_batches`.
        workers: decoding processes.
        load: gives the batches of positions (decoded before); None: the images are decoded.
        most_batches: use the first so many.
        agreed: paths of layers that keep what they have.

    Returns:
        How many batches were used.

    Raises:
        DomainError: no batch of at least two images, or too many broken ones.
    """
    layers = batchnorm_layers(model, agreed)
    plans = even_batches(len(domain), batch_size, seed)[:most_batches]
    sums = [torch.zeros(2, layer.num_features, dtype=torch.float64) for layer in layers]
    uses = torch.zeros(len(layers), dtype=torch.float64)
    batches = 0
    model.eval()
    with (
        by_batch(layers),
        progress_bar(sum(map(len, plans)), "img", "re-estimate BatchNorm", keep=False) as bar,
    ):
        mine = plans[team.rank :: team.size]
        for batch in load(mine) if load else load_batches(domain, mine, how, workers=workers):
            ledger.add(batch.broken)
            bar.update(len(batch.indices) * team.size)
            images = batch.images[batch.valid]
            if len(images) < 2:
                continue
            batches += 1
            for layer in layers:
                layer.reset_running_stats()
            model(input_tensor(images.to(team.device), how))
            for place, layer in enumerate(layers):
                if layer.num_batches_tracked:  # a layer that the forward pass does not reach stays as it is
                    sums[place] += torch.stack(_statistics(layer)).double().cpu()
                    uses[place] += 1
    ledger.settle(team)
    *totals, uses, used = _sum_all(team, [*sums, uses, torch.tensor([batches], dtype=torch.float64)])
    if not used:
        raise DomainError(f"{domain.name}: no batch with two images that can be decoded.")
    for layer, both, count in zip(layers, totals, uses.tolist()):
        if count:
            for buffer, total in zip(_statistics(layer), both):
                buffer.copy_(total / count)
            layer.num_batches_tracked.fill_(int(count))  # type: ignore[union-attr]
    return int(used)


def _statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The layer's running mean and variance, each (C,)."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    return layer.running_mean, layer.running_var


@contextmanager
def by_batch(layers: list[_BatchNorm]) -> Iterator[None]:
    """While inside, layers normalise by the batch and note its statistics; then all is as it was."""
    before = [(layer.momentum, {k: v.clone() for k, v in layer.named_buffers()}) for layer in layers]
    for layer in layers:
        layer.momentum, layer.training = None, True
    try:
        yield
    finally:
        for layer, (momentum, buffers) in zip(layers, before):
            layer.momentum, layer.training = momentum, False
            for name, buffer in buffers.items():
                getattr(layer, name).copy_(buffer)


def _sum_all(team: Team, tensors: list[Tensor]) -> list[Tensor]:
    """The sums of float64 tensors over all processes, in one reduction."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(team.device)
    parts = team.sum(flat).cpu().split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]
