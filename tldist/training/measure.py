"""How good a model is on a labelled domain, by class names, over all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_confusion_matrix,
    multilabel_average_precision,
    multilabel_f1_score,
)

from tldist.bundle import Task
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
        logits, labels: float32 (N, K), and int64 (N,) or of several classes an image float32 (N, K), in the
            domain's order, where they were asked for.
    """

    accuracy: float
    loss: float
    count: int
    broken: int
    classes: tuple[str, ...]
    logits: Tensor | None
    labels: Tensor | None

    @property
    def score(self) -> float:
        """What the best model has most of."""
        return self.accuracy

    def better_than(self, score: float, loss: float) -> bool:
        """Whether it has the higher score; where scores are equal, the lower loss."""
        return (self.score, -self.loss) > (score, -loss)

    def numbers(self) -> dict[str, float]:
        """What a training logs of it."""
        more = {} if self.score == self.accuracy else {"val_score": self.score}
        return {"val_accuracy": self.accuracy, "val_loss": self.loss, **more}

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        names = ("accuracy", "loss", "count", "broken")
        return {**{name: getattr(self, name) for name in names}, "classes": list(self.classes)}


@dataclass(frozen=True)
class OneClassMeasurement(Measurement):
    """Of images with one class each.

    Attributes:
        confusion: int64 (K, K): rows are true classes, columns predicted ones.
        top5: share of images whose class is among the five best answers.
    """

    confusion: np.ndarray
    top5: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, with the accuracy of each class that occurs."""
        totals = self.confusion.sum(1)
        per_class = {
            name: float(self.confusion[row, row] / totals[row])
            for row, name in enumerate(self.classes)
            if totals[row]
        }
        confusion = self.confusion.tolist()
        return {**super().to_dict(), "top5": self.top5, "per_class": per_class, "confusion": confusion}


@dataclass(frozen=True)
class MultilabelMeasurement(Measurement):
    """Of images with any number of classes; accuracy is the share of right decisions, a half the threshold.

    Attributes:
        average_precision: by class, of those that occur.
        f1: over all decisions.
    """

    average_precision: dict[str, float]
    f1: float

    @property
    def score(self) -> float:
        """Mean average precision over the classes that occur."""
        return float(np.mean(list(self.average_precision.values()))) if self.average_precision else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, with the average precision of each class that occurs."""
        more = {"mean_average_precision": self.score, "f1": self.f1, "per_class": self.average_precision}
        return {**super().to_dict(), **more}


def why_not_measurable(domain: Domain, classes: Sequence[str], task: Task) -> str | None:
    """Why a model with these classes and this task cannot be measured on a domain; None: it can."""
    if not domain.has_labels:
        return "it has no labels"
    if domain.is_multilabel and task == "multiclass":
        return "its images have several classes each, and the model answers with one"
    if task == "multilabel" and not domain.is_multilabel:
        return (
            "its images have one class each, and the model answers with any number (a list a row is needed)"
        )
    unknown = set(domain.used_classes) - set(classes)
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
    keeps = keep_logits or domain.is_multilabel
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
            rows.append((torch.cat([found, logits], 1) if keeps else found)[batch.valid].numpy())
            bar.update(len(batch.indices) * team.size)
    broken = ledger.settle(team)
    parts = [part for part in team.gather(np.concatenate(rows) if rows else None) if part is not None]
    if not parts or not sum(map(len, parts)):
        raise DomainError(f"{domain.name}: no image could be decoded.")
    table = np.concatenate(parts)
    table = table[np.argsort(table[:, 0], kind="stable")]
    _check_finite(table, domain)
    judge = _judge_several if domain.is_multilabel else _judge_one
    return judge(table, domain, tuple(classes), broken, keep_logits)


def _row_of_each(batch: Batch, logits: Tensor) -> Tensor:
    """float64 (N, 5): position, loss, and of one class an image its label, the answer, and how many classes
    score above the right one."""
    if batch.labels.dim() == 2:
        losses = nn.functional.binary_cross_entropy_with_logits(
            logits, batch.labels.double(), reduction="none"
        )
        return torch.stack([batch.indices.double(), losses.mean(1)], 1)
    losses = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    above = (logits > logits.gather(1, batch.labels[:, None])).sum(1)
    columns = [batch.indices, losses, batch.labels, logits.argmax(1), above]
    return torch.stack([column.double() for column in columns], 1)


def _judge_one(
    table: np.ndarray, domain: Domain, classes: tuple[str, ...], broken: int, keep_logits: bool
) -> Measurement:
    truth, answer = torch.from_numpy(table[:, 2]).long(), torch.from_numpy(table[:, 3]).long()
    return OneClassMeasurement(
        accuracy=float((truth == answer).double().mean()),
        loss=float(table[:, 1].mean()),
        count=len(table),
        broken=broken,
        classes=classes,
        confusion=multiclass_confusion_matrix(answer, truth, num_classes=len(classes)).numpy(),
        top5=float((table[:, 4] < 5).mean()),
        logits=torch.from_numpy(table[:, 5:]).float() if keep_logits else None,
        labels=truth if keep_logits else None,
    )


def _judge_several(
    table: np.ndarray, domain: Domain, classes: tuple[str, ...], broken: int, keep_logits: bool
) -> Measurement:
    truth = torch.from_numpy(domain.labels_in(classes)[table[:, 0].astype(np.int64)])
    logits = torch.from_numpy(table[:, 2:])
    present = truth.any(0)
    precisions = multilabel_average_precision(logits, truth.long(), num_labels=len(classes), average="none")
    f1 = multilabel_f1_score(logits, truth.long(), num_labels=len(classes), average="micro")
    named = zip(classes, precisions.reshape(-1).tolist(), present.tolist())
    return MultilabelMeasurement(
        accuracy=float(((logits > 0) == (truth > 0.5)).double().mean()),
        loss=float(table[:, 1].mean()),
        count=len(table),
        broken=broken,
        classes=classes,
        average_precision={name: value for name, value, occurs in named if occurs},
        f1=float(f1),
        logits=logits.float() if keep_logits else None,
        labels=truth if keep_logits else None,
    )


def _check_finite(table: np.ndarray, domain: Domain) -> None:
    """`ModelError` where a loss is not finite: NaN or infinity in the model's outputs."""
    bad = table[~np.isfinite(table[:, 1]), 0]
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
