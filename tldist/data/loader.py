"""From samples of a domain to batches of tensors, decoded by worker processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tldist.data.augment import Augmentation, augment
from tldist.data.order import StepPlan
from tldist.domain import Domain
from tldist.process import core_count
from tldist.runtime.decode import BadImage
from tldist.runtime.preprocess import Preprocessing, prepare


@dataclass
class Batch:
    """Decoded samples.

    Attributes:
        images: uint8 (N, H, W, 3); zeros where an image is broken.
        labels: int64 (N,), positions in the class list that the loader was given; -1: no label. Or floats
            (N, ...), whatever the objective takes.
        indices: int64 (N,), positions in the domain.
        valid: bool (N,), False for broken images and for the filler of an empty share.
        broken: (index, reason) of the broken images.
        step: the step this batch belongs to; None in evaluation.
        beside: images of a second domain in the same step; None: there is none.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    valid: Tensor
    broken: list[tuple[int, str]]
    step: StepPlan | None = None
    beside: Batch | None = None

    def pin_memory(self) -> Batch:
        """Called by the loader where a GPU waits."""
        self.images, self.labels = self.images.pin_memory(), self.labels.pin_memory()
        self.valid = self.valid.pin_memory()
        return self


class _Decoder(Dataset[Batch]):
    """Decodes a whole batch in one call, in whichever process it is asked."""

    def __init__(
        self,
        domain: Domain,
        labels: np.ndarray,
        how: Preprocessing,
        augmentation: Augmentation | None,
        views: int | None,
        seed: int,
    ) -> None:
        self.domain, self.labels, self.how = domain, labels, how
        self.augmentation, self.views, self.seed = augmentation, views, seed

    def __getitem__(self, plan: StepPlan | np.ndarray) -> Batch:
        step = plan if isinstance(plan, StepPlan) else None
        indices = plan.indices if isinstance(plan, StepPlan) else plan
        filler = len(indices) == 0  # a process without samples still takes part in the step
        if filler:
            indices = np.zeros(1, dtype=np.int64)
        images = np.zeros((len(indices), self.how.height, self.how.width, 3), dtype=np.uint8)
        valid = np.full(len(indices), not filler)
        broken: list[tuple[int, str]] = []
        for place, index in enumerate([] if filler else indices.tolist()):
            try:
                images[place] = self._decode(index, step)
            except BadImage as reason:
                valid[place] = False
                broken.append((index, str(reason)))
        return Batch(
            torch.from_numpy(images),
            torch.from_numpy(self.labels[indices]),
            torch.from_numpy(np.asarray(indices, dtype=np.int64)),
            torch.from_numpy(valid),
            broken,
            step,
        )

    def _decode(self, index: int, step: StepPlan | None) -> np.ndarray:
        data = self.domain.read(index)
        if step is None or self.augmentation is None:
            return prepare(data, self.how)
        view = step.epoch % self.views if self.views else step.epoch
        return augment(data, self.how, self.augmentation, self.seed, view, index)


def num_workers(asked: int | None, processes_here: int) -> int:
    """Decoding processes for each of the processes of this host."""
    if asked is not None:
        return asked
    cores = core_count()
    return min(8, max(0, cores // max(1, processes_here) - 1))


def load_batches(
    domain: Domain,
    plans: Iterable[StepPlan] | Iterable[np.ndarray],
    how: Preprocessing,
    *,
    classes: Iterable[str] | None = None,
    augmentation: Augmentation | None = None,
    views: int | None = None,
    seed: int = 0,
    workers: int = 0,
) -> Iterator[Batch]:
    """Decode batches in the order of ``plans``, ahead of their use where there are workers.

    Args:
        domain: the samples.
        plans: steps of a run, or arrays of positions in the domain.
        how: the model's preprocessing.
        classes: the class list that labels refer to; None: the domain's own.
        augmentation: applied to steps of a run; None: the preprocessing of evaluation.
        views: fixed views of each image that epochs take in turn; None: a new one each epoch.
        seed: of the augmentation.
        workers: decoding processes; 0 decodes in this one.
    """
    labels = domain.labels_in(list(domain.classes if classes is None else classes))
    dataset = _Decoder(domain, labels, how, augmentation, views, seed)
    options: dict[str, Any] = {"prefetch_factor": 4} if workers else {}
    loader: DataLoader[Batch] = DataLoader(
        dataset,
        batch_size=None,
        sampler=plans,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **options,
    )
    yield from loader
