"""The new head: fitted on the labelled source in the common space, perhaps weighted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from tldist.domain import Domain
from tldist.features.heads import LinearHead, Sweep, sweep_logistic
from tldist.features.nearest import NeighbourHead, sweep_class_means, sweep_neighbours
from tldist.files import atomic_file

Head = LinearHead | NeighbourHead
WEIGHTS_FILE = "weights.parquet"


@dataclass(frozen=True)
class Samples:
    """What a head is fitted on, in the common space.

    Attributes:
        features: float64 (N, D).
        labels: int64 (N,).
        held_out: bool (N,): the samples that choose between heads.
        weights: float64 (N,).
    """

    features: Tensor
    labels: Tensor
    held_out: Tensor
    weights: Tensor

    def with_told(self, features: Tensor, labels: Tensor) -> Samples:
        """With target samples (M, D) whose labels are known; together they weigh as much as the source."""
        if len(labels) == 0:
            return self
        share = self.weights.sum() / len(labels)
        return Samples(
            torch.cat([self.features, features]),
            torch.cat([self.labels, labels]),
            torch.cat([self.held_out, torch.zeros(len(labels), dtype=torch.bool)]),
            torch.cat([self.weights, share.expand(len(labels))]),
        )


def refit(samples: Samples, num_classes: int, head: Literal["logistic", "ncm", "knn"]) -> Sweep[Head]:
    """Fit the head that was asked for, its one setting chosen by the held-out samples."""
    data = (samples.features, samples.labels, num_classes, samples.held_out)
    found: Sweep[LinearHead] | Sweep[NeighbourHead]
    if head == "knn":
        found = sweep_neighbours(*data)
    else:
        sweep = {"logistic": sweep_logistic, "ncm": sweep_class_means}[head]
        found = sweep(*data, weights=samples.weights)
    return Sweep(found.head, found.held_out_accuracy, found.held_out_loss, found.tried)


def write_weights(path: Path, domain: Domain, indices: Tensor, weights: Tensor) -> None:
    """Write the weights of source samples as Parquet: ``id`` (string), ``weight`` (float64)."""
    ids = [domain.id(index) for index in indices.tolist()]
    table = pa.table({"id": pa.array(ids, pa.string()), "weight": pa.array(weights.numpy(), pa.float64())})
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary)
