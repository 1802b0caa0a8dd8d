"""The maps into a common space that are made of the moments of paired features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tldist.errors import DomainError
from tldist.features.arrays import Values, as_features, like
from tldist.features.cross_moments import CrossMoments
from tldist.models.chain import Affine

Into = Literal["source", "target"]
"""Whose features are the common space, where a method maps one side to the other."""


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


def one_way(weight: Tensor, pairs: CrossMoments, into: Into, details: Mapping[str, Any]) -> Maps:
    """The maps where the side x of ``pairs`` goes to y's space, mean to mean, and the other side stays.

    Args:
        weight: (E, D).
        pairs: with the source as x; swapped where the target is what is mapped.
        into: whose space y's is.
        details: of the maps.
    """
    x_mean, y_mean = pairs.means
    moved = affine(weight, y_mean - weight @ x_mean)
    return Maps(moved, None, details) if into == "target" else Maps(None, moved, details)


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
