"""One pass over a domain: the moments of all its features, and the features of the samples to keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError
from tldist.features.extract import Features, feature_batches
from tldist.features.moments import Moments, gather_moments, moments_of
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger


@dataclass(frozen=True)
class Read:
    """What an alignment knows of a domain, on every process.

    Attributes:
        moments: of all samples; None: not asked for.
        kept: of the samples to keep, in the order of the domain.
    """

    moments: Moments | None
    kept: Features


def read_domain(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    keep: np.ndarray,
    with_moments: bool,
    classes: Sequence[str] | None,
    batch_size: int,
    workers: int,
    label: str,
) -> Read:
    """Extract features, take their moments, and keep some; called by all processes together.

    Memory is bounded by the samples that are kept, and the moments.

    Args:
        model, how, domain, team, ledger, batch_size, workers, label: as in
            `tldist.features.extract.feature_batches`.
        keep: bool (N,) over the domain.
        with_moments: whether they are asked for.
        classes: that labels refer to; None: labels are not read.

    Raises:
        DomainError: fewer than two images can be decoded.
    """
    kept: list[Features] = []
    batches = feature_batches(
        model, how, domain, team, ledger, batch_size=batch_size, workers=workers, classes=classes, label=label
    )

    def each() -> Iterator[Tensor]:
        for batch in batches:
            chosen = torch.from_numpy(keep)[batch.indices]
            if chosen.any():
                kept.append(
                    Features(*(part[chosen] for part in (batch.features, batch.labels, batch.indices)))
                )
            if with_moments and len(batch):
                yield batch.features

    mine = moments_of(each())
    ledger.settle(team)
    found = _gather(kept, team)
    moments = gather_moments(mine, team) if with_moments else None
    count = moments.count if moments else len(found)
    if count < 2:
        raise DomainError(f"{domain.name}: fewer than 2 images can be decoded; an alignment needs many.")
    return Read(moments, found)


def _gather(mine: list[Features], team: Team) -> Features:
    """All processes' features, in the order of the domain."""
    own = [(part.features.numpy(), part.labels.numpy(), part.indices.numpy()) for part in mine]
    parts = [part for share in team.gather(own) for part in share]
    if not parts:
        return Features(torch.zeros(0, 0), torch.zeros(0).long(), torch.zeros(0).long())
    features, labels, indices = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts))
    order = indices.argsort()
    return Features(features[order], labels[order], indices[order])
