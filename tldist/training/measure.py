"""How good a model is on a labelled domain, by class names, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from tldist.data.loader import Batch, load_batches
from tldist.data.order import blocks_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError, ModelError, Preempted
from tldist.progress import progress_bar
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger
from tldist.training.signals import StopFlag

Predict = Callable[[Tensor], Tensor]
"""uint8 images (N, H, W, 3) to logits (N, K)."""


@dataclass(frozen=True)
class Measurement:
    """Quality on one domain. Independent of the number of processes and of the batch size.

    Attributes:
        accuracy: share of right answers.
        loss: mean cross-entropy in nats.
        count: images measured (the broken ones left out).
        broken: images that could not be decoded.
        classes: names, in the model's order.
        confusion: int64 (K, K): rows are true classes, columns predicted ones.
        top5: share of images whose class is among the five best answers.
        logits, labels: float32 (N, K) and int64 (N,) in the domain's order, where they were asked for.
    """

    accuracy: float
    loss: float
    count: int
    broken: int
    classes: tuple[str, ...]
    confusion: np.ndarray
    top5: float
    logits: Tensor | None = None
    labels: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, with the accuracy of each class that occurs."""
        totals = self.confusion.sum(1)
        per_class = {
            name: float(self.confusion[row, row] / totals[row])
            for row, name in enumerate(self.classes)
            if totals[row]
        }
        return {
            "accuracy": self.accuracy,
            "top5": self.top5,
            "loss": self.loss,
            "count": self.count,
            "broken": self.broken,
            "per_class": per_class,
            "classes": list(self.classes),
            "confusion": self.confusion.tolist(),
        }


def why_not_measurable(domain: Domain, classes: Sequence[str]) -> str | None:
    """Why a model with these classes cannot be measured on a domain; None: it can."""
    if not domain.has_labels:
        return "it has no labels"
    unknown = {domain.classes[label] for label in np.unique(domain.labels)} - set(classes)
    if unknown:
        return f"the model does not know its class '{min(unknown)}'"
    return None


def measure(
    predict: Predict,
    domain: Domain,
    classes: Sequence[str],
    how: Preprocessing,
    team: Team,
    *,
    batch_size: int = 64,
    workers: int = 0,
    ledger_file: Path | None = None,
    label: str = "evaluate",
    load: Callable[[Sequence[np.ndarray]], Iterable[Batch]] | None = None,
    keep_logits: bool = False,
    stop: StopFlag | None = None,
) -> Measurement:
    """Measure a classifier on a labelled domain; called by all processes together.

    Args:
        predict: images to logits.
        domain: with labels; its class order does not matter.
        classes: names of the logits.
        how: the model's preprocessing.
        team: the processes.
        batch_size: images that one process handles at once.
        workers: decoding processes.
        ledger_file: where broken images are listed.
        label: of the progress bar.
        load: gives the batches of positions (cached features); None: the images are decoded.
        keep_logits: hand over the logits of all images too.
        stop: whether this process was asked to stop; None: it goes on to the end.

    Raises:
        Preempted: a process was asked to stop; on all of them alike.
        DomainError: no labels, classes that the model does not know, or too many broken images.
        ModelError: an output is not finite.
    """
    if not domain.has_labels:
        raise DomainError(f"{domain.name}: has no labels to measure against.")
    ledger = Ledger(domain, ledger_file)
    rows: list[np.ndarray] = []
    plans = [*blocks_of(len(domain), batch_size, team.rank, team.size)]
    mine = len(plans)
    # All make the same number of forward passes: a sharded model meets the others in each.
    plans += [np.zeros(1, np.int64)] * (len(blocks_of(len(domain), batch_size, 0, team.size)) - mine)
    with progress_bar(len(domain), "img", label, keep=False) as bar:
        batches = load(plans) if load else load_batches(domain, plans, how, classes=classes, workers=workers)
        for place, batch in enumerate(batches):
            if stop is not None and team.any(stop.requested):
                raise Preempted(f"told to stop while measuring ({label})")
            if place >= mine:
                predict(batch.images.to(team.device))
                continue
            ledger.add(batch.broken)
            logits = predict(batch.images.to(team.device)).double().cpu()
            found = _row_of_each(batch, logits)
            rows.append((torch.cat([found, logits], 1) if keep_logits else found)[batch.valid].numpy())
            bar.update(len(batch.indices) * team.size)
    broken = ledger.settle(team)
    parts = [part for part in team.gather(np.concatenate(rows) if rows else None) if part is not None]
    if not parts or not sum(map(len, parts)):
        raise DomainError(f"{domain.name}: no image could be decoded.")
    table = np.concatenate(parts)
    table = table[np.argsort(table[:, 0], kind="stable")]
    _check_finite(table, domain)
    truth, answer = torch.from_numpy(table[:, 1]).long(), torch.from_numpy(table[:, 2]).long()
    return Measurement(
        accuracy=float((truth == answer).double().mean()),
        loss=float(table[:, 3].mean()),
        count=len(table),
        broken=broken,
        classes=tuple(classes),
        confusion=multiclass_confusion_matrix(answer, truth, num_classes=len(classes)).numpy(),
        top5=float((table[:, 4] < 5).mean()),
        logits=torch.from_numpy(table[:, 5:]).float() if keep_logits else None,
        labels=truth if keep_logits else None,
    )


def _row_of_each(batch: Batch, logits: Tensor) -> Tensor:
    """float64 (N, 5): position, label, answer, loss, and how many classes score above the right one."""
    losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    above = (logits > logits.gather(1, batch.labels[:, None])).sum(1)
    columns = [batch.indices, batch.labels, logits.argmax(1), losses, above]
    return torch.stack([column.double() for column in columns], 1)


def _check_finite(table: np.ndarray, domain: Domain) -> None:
    """`ModelError` where a loss is not finite: NaN or infinity in the model's outputs."""
    bad = table[~np.isfinite(table[:, 3]), 0]
    if len(bad):
        raise ModelError(
            f"the model's outputs are not finite (NaN or infinity) for {len(bad)} of {len(table)} images of "
            f"{domain.name}, the first is {domain.id(int(bad[0]))}: its weights are broken, or it diverged."
        )


def predictor(
    model: nn.Module, how: Preprocessing, *, precision: str = "fp32", channels_last: bool = False
) -> Predict:
    """A model in evaluation mode as a function from uint8 images to logits, without gradients."""
    from tldist.models.load import input_tensor

    memory = torch.channels_last if channels_last else torch.contiguous_format

    @torch.no_grad()
    def predict(images: Tensor) -> Tensor:
        if model.training:  # setting it walks through every module
            model.eval()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        with torch.autocast(images.device.type, dtype=dtype, enabled=precision != "fp32"):
            logits: Tensor = model(input_tensor(images, how, memory))
        return logits.float()

    return predict
