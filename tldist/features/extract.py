"""Features of a domain: what a model's head reads, for every image, over all processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tldist.data.loader import load_batches
from tldist.data.order import blocks_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError, ModelError
from tldist.models.heads import tapped
from tldist.models.load import input_tensor
from tldist.progress import progress_bar
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger


@dataclass(frozen=True)
class Features:
    """Features of images, on the CPU.

    Attributes:
        features: float32 (N, D): the input of the model's head, mean over space where it has one.
        labels: int64 (N,), positions in the class list that was asked for; -1: no label.
        indices: int64 (N,), positions in the domain; broken images are left out.
    """

    features: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.indices)


@torch.no_grad()
def extract_batch(model: nn.Module, how: Preprocessing, images: Tensor) -> Tensor:
    """Features of one batch.

    Args:
        model: in evaluation mode.
        how: its preprocessing (the normalisation).
        images: uint8 (N, H, W, 3), on the model's device.

    Returns:
        float32 (N, D), on that device.
    """
    with tapped(model) as features:
        model(input_tensor(images, how))
        return features().float()


def feature_batches(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    batch_size: int = 64,
    workers: int = 0,
    classes: Iterable[str] | None = None,
    label: str = "features",
) -> Iterator[Features]:
    """This process's share of a domain's features, batch by batch, in the order of the domain.

    A batch has the same images whatever the number of processes.

    Args:
        model: on the team's device; its head stays where it is.
        how: the model's preprocessing.
        domain: the images.
        team: the processes.
        ledger: takes the broken images; to be settled by all processes at the end.
        batch_size: images that one process handles at once.
        workers: decoding processes.
        classes: the class list that labels refer to; None: the domain's own.
        label: of the progress bar.

    Raises:
        ModelError: a feature is not finite; the image is named.
    """
    model.eval()
    plans = blocks_of(len(domain), batch_size, team.rank, team.size)
    with progress_bar(len(domain), "img", label, keep=False) as bar:
        for batch in load_batches(domain, plans, how, classes=classes, workers=workers):
            ledger.add(batch.broken)
            found = extract_batch(model, how, batch.images.to(team.device)).cpu()[batch.valid]
            indices = batch.indices[batch.valid]
            _check_finite(found, indices, domain)
            bar.update(len(batch.indices) * team.size)
            yield Features(found, batch.labels[batch.valid], indices)


def extract(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    *,
    batch_size: int = 64,
    workers: int = 0,
    classes: Iterable[str] | None = None,
    ledger: Ledger | None = None,
    label: str = "features",
) -> Features:
    """Features of a whole domain on every process; called by all of them together.

    The result is in the order of the domain and does not depend on the number of processes. Arguments as
    in `feature_batches`; without ``ledger``, broken images are counted and judged but not listed.

    Raises:
        DomainError: too many broken images, or none that can be decoded.
        ModelError: a feature is not finite.
    """
    ledger = ledger or Ledger(domain, None)
    batches = feature_batches(
        model, how, domain, team, ledger, batch_size=batch_size, workers=workers, classes=classes, label=label
    )
    mine = [(b.features.numpy(), b.labels.numpy(), b.indices.numpy()) for b in batches if len(b)]
    ledger.settle(team)
    parts = [part for share in team.gather(mine) for part in share]
    if not parts:
        raise DomainError(f"{domain.name}: no image could be decoded.")
    features, labels, indices = (np.concatenate(column) for column in zip(*parts))
    order = np.argsort(indices)
    return Features(
        torch.from_numpy(features[order]), torch.from_numpy(labels[order]), torch.from_numpy(indices[order])
    )


def _check_finite(features: Tensor, indices: Tensor, domain: Domain) -> None:
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        first = domain.id(int(indices[bad][0]))
        raise ModelError(
            f"the model's features of {int(bad.sum())} images are not finite (NaN or infinity), the first is "
            f"{first} in {domain.name}. Its weights are broken, or the image is far outside of what it knows."
        )
