"""Moments of paired features, and the maps into a common space that are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, like
from tldist.features.moments import Moments
from tldist.models.chain import Affine


@dataclass(frozen=True)
class PairedMoments:
    """First and second moments of pairs (x, y), x of the source's model and y of the target's.

    Attributes:
        joint: the moments of x and y side by side, (N, D + E).
        width: D, of x.
    """

    joint: Moments
    width: int

    @classmethod
    def from_batch(cls, source: Values, target: Values) -> PairedMoments:
        """Of one batch: (N, D) and (N, E), row by row the same samples.

        Raises:
            DomainError: other numbers of rows, or numbers that are not finite.
        """
        x, y = as_features(source, "the source's features"), as_features(target, "the target's features")
        if len(x) != len(y):
            raise DomainError(f"{len(x)} source and {len(y)} target rows: pairs need one of each.")
        return cls(Moments.from_batch(torch.cat([x, y.to(x.device)], dim=1)), x.shape[1])

    def merge(self, other: PairedMoments) -> PairedMoments:
        """The moments of both sets of pairs together."""
        return PairedMoments(self.joint.merge(other.joint), self.width)

    @property
    def count(self) -> int:
        """N."""
        return self.joint.count

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """float64 (D,) and (E,)."""
        return self.joint.mean[: self.width], self.joint.mean[self.width :]

    @property
    def scatters(self) -> tuple[Tensor, Tensor, Tensor]:
        """float64 (D, D), (D, E), (E, E): sums of xx^T, xy^T, yy^T of deviations from the means."""
        scatter, width = self.joint.scatter, self.width
        return scatter[:width, :width], scatter[:width, width:], scatter[width:, width:]

    def check_count(self, least: int) -> None:
        """Refuse fewer pairs than ``least``.

        Raises:
            DomainError: there are fewer.
        """
        if self.count < least:
            raise DomainError(f"{self.count} pairs, expected at least {least} to fit a map between features.")


@dataclass(frozen=True)
class Maps:
    """Maps of both models' features into one space, in float64; None leaves features as they are.

    Attributes:
        source: what source features pass through before the head is fitted on them.
        target: what target features pass through; it becomes part of the model.
        details: what was found on the way, as plain data.
    """

    source: Affine | None
    target: Affine | None
    details: Mapping[str, Any] = field(default_factory=dict)

    def map_source(self, features: Values) -> Any:
        """Source features (N, D) in the common space, in the kind of array that was given."""
        return _apply(self.source, features)

    def map_target(self, features: Values) -> Any:
        """Target features (N, E) in the common space, in the kind of array that was given."""
        return _apply(self.target, features)


def affine(weight: Tensor, bias: Tensor) -> Affine:
    """The map ``x -> weight x + bias`` in float64."""
    made = Affine(weight.shape[1], weight.shape[0]).double()
    made.weight, made.bias = weight.contiguous(), bias
    return made


def _apply(transform: Affine | None, features: Values) -> Any:
    values = as_features(features)
    if transform is not None and transform.weight.shape[1] != values.shape[1]:
        raise DomainError(
            f"features of {values.shape[1]} dimensions, but the map reads {transform.weight.shape[1]}."
        )
    return like(values if transform is None else transform(values), features)
