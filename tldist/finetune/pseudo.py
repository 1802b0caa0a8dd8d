"""Labels that the model gives the target before each epoch, kept on disk so that a run goes on the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tldist.adaptation.observe import observe
from tldist.adaptation.pseudo_labels import pseudo_labels
from tldist.data.loader import Batch
from tldist.files import atomic_file
from tldist.finetune.job import Job

FOLDER = "pseudo_labels"


def with_pseudo_labels(job: Job, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of the target with the labels of their epoch (SHOT, arXiv:2002.08546, eq. 5-7)."""
    labels, known = torch.empty(0, dtype=torch.int64), -1
    for batch in batches:
        assert batch.step is not None
        if batch.step.epoch != known:
            known = batch.step.epoch
            labels = torch.from_numpy(_of_epoch(job, known))
        yield replace(batch, labels=labels[batch.indices])


def _of_epoch(job: Job, epoch: int) -> np.ndarray:
    """int64 (N,), -1 for broken images: made by the model as it is when the epoch begins.

    A run that goes on inside an epoch has another model; so they are written before the epoch's first step.
    """
    file = job.folder.path / FOLDER / f"epoch-{epoch:04d}.npy"
    if not job.team.on_main(file.is_file):
        job.team.same_buffers(job.model)
        seen = observe(
            job.model,
            job.inputs.how,
            job.inputs.train,
            job.team,
            classes=job.inputs.classes,
            workers=job.workers,
            label="pseudo-labels",
        )
        labels = np.full(len(job.inputs.train), -1, dtype=np.int64)
        logits = torch.from_numpy(seen.logits).double()
        labels[seen.indices] = pseudo_labels(torch.from_numpy(seen.features), logits.softmax(1)).numpy()
        job.team.on_main(lambda: _write(file, labels))
    found: np.ndarray = job.team.on_main(lambda: np.load(file, allow_pickle=False))
    return found


def _write(file: Path, labels: np.ndarray) -> None:
    with atomic_file(file) as temporary:
        np.save(temporary, labels, allow_pickle=False)
