"""What a model says of a whole domain, over all processes: features and answers, also to mixed images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tldist.data.loader import load_batches
from tldist.data.order import blocks_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError
from tldist.features.scorers.mixing import mix, partners
from tldist.models.heads import tapped
from tldist.models.load import input_tensor
from tldist.progress import progress_bar
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger

_BATCH = 64


@dataclass(frozen=True)
class Observed:
    """What a model says of the N images of a domain that can be decoded, in its order.

    Attributes:
        features: float32 (N, D), what the head reads.
        logits: float32 (N, K).
        labels: int64 (N,), positions in the class list that was asked for; -1: no label.
        indices: int64 (N,), positions in the domain.
    """

    features: np.ndarray
    logits: np.ndarray
    labels: np.ndarray
    indices: np.ndarray


@torch.no_grad()
def observe(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    *,
    classes: Sequence[str],
    workers: int = 0,
    label: str = "observe",
) -> Observed:
    """Run a model over a domain, in fp32; called by all processes together.

    Args:
        model: on the team's device.
        how: its preprocessing.
        domain: the images.
        team: the processes.
        classes: the class list that labels refer to.
        workers: decoding processes.
        label: of the progress bar.

    Returns:
        The same on all processes, however many there are.

    Raises:
        DomainError: too many broken images, or none that can be decoded.
    """
    model.eval()
    ledger, parts = Ledger(domain, None), []
    plans = blocks_of(len(domain), _BATCH, team.rank, team.size)
    with progress_bar(len(domain), "img", label, keep=False) as bar, tapped(model) as features:
        for batch in load_batches(domain, plans, how, classes=classes, workers=workers):
            ledger.add(batch.broken)
            logits = model(input_tensor(batch.images.to(team.device), how))
            columns = (features(), logits, batch.labels, batch.indices)
            parts.append([column.cpu()[batch.valid].numpy() for column in columns])
            bar.update(len(batch.indices) * team.size)
    ledger.settle(team)
    whole = [part for share in team.gather(parts) for part in share]
    if not sum(len(part[3]) for part in whole):
        raise DomainError(f"{domain.name}: no image could be decoded.")
    seen, said, labels, indices = (np.concatenate(column) for column in zip(*whole))
    order = np.argsort(indices)
    return Observed(
        seen[order].astype(np.float32), said[order].astype(np.float32), labels[order], indices[order]
    )


@torch.no_grad()
def observe_mixtures(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    *,
    seed: int = 0,
    workers: int = 0,
    label: str = "observe mixtures",
) -> tuple[Tensor, Tensor]:
    """A model's answers to mixtures of two images each (`tldist.features.scorers.mixing`), in fp32; called by
    all processes together.

    Args:
        model, how, team, workers, label: as in `observe`.
        domain: images that can all be decoded.
        seed: of who is mixed with whom.

    Returns:
        With which image each is mixed, and the class that the mixture is taken for: int64 (N,) both.
    """
    model.eval()
    partner = partners(len(domain), seed)
    plans = blocks_of(len(domain), _BATCH, team.rank, team.size)
    first = load_batches(domain, plans, how, workers=workers)
    second = load_batches(domain.subset(partner.numpy()), plans, how, workers=workers)
    mine: list[tuple[np.ndarray, np.ndarray]] = []
    with progress_bar(len(domain), "img", label, keep=False) as bar:
        for batch, other in zip(first, second):
            one, two = (input_tensor(part.images.to(team.device), how) for part in (batch, other))
            answers = model(mix(one, two)).argmax(1).cpu()
            mine.append((batch.indices.numpy(), answers.numpy()))
            bar.update(len(answers) * team.size)
    found = torch.empty(len(domain), dtype=torch.int64)
    for part in team.gather(mine):
        for indices, answers in part:
            found[torch.from_numpy(indices)] = torch.from_numpy(answers)
    return partner, found
