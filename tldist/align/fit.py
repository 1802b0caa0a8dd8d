"""What an alignment is given and what it gives: two domains in, two maps into a common space out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tldist.errors import DomainError
from tldist.features.moments import Moments
from tldist.models.transforms import Array, Transform

Data = Tensor | np.ndarray
"""Features (N, D) of a domain that lie in memory, of any float type."""
Labels = Tensor | np.ndarray
"""Classes (N,) of samples, 0 .. K - 1; -1 where there is none."""


@dataclass(frozen=True)
class Fit:
    """Maps into the common space, in float64; None leaves features as they are.

    Attributes:
        source: what source features pass through before the head is refitted on them.
        target: what target features pass through; it becomes part of the model.
        notes: what a method says of its fit (the dimensions it chose, its iterations), as plain data.
    """

    source: Transform | None
    target: Transform | None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def map_source(self, features: Array) -> Array:
        """Source features (N, D) in the common space, of the kind that was given."""
        return features if self.source is None else self.source.transform(features)

    def map_target(self, features: Array) -> Array:
        """Target features (N, D) in the common space, of the kind that was given."""
        return features if self.target is None else self.target.transform(features)


def as_moments(domain: Moments | Data) -> Moments:
    """The moments of a domain, computed where samples are given."""
    return domain if isinstance(domain, Moments) else Moments.from_batch(domain)


def two_moments(source: Moments | Data, target: Moments | Data) -> tuple[Moments, Moments]:
    """The moments of both domains.

    Raises:
        DomainError: they have other widths, or one has fewer than two samples.
    """
    first, second = as_moments(source), as_moments(target)
    check_widths(first.width, second.width)
    for name, found in (("source", first), ("target", second)):
        if found.count < 2:
            raise DomainError(f"the {name} has {found.count} sample; an alignment needs at least two.")
    return first, second


def two_samples(source: Data, target: Data) -> tuple[Tensor, Tensor]:
    """The samples of both domains as float64 tensors on the CPU.

    Raises:
        DomainError: moments were given, they have other widths, or one has fewer than two samples.
    """
    found = []
    for name, domain in (("source", source), ("target", target)):
        if isinstance(domain, Moments):
            raise DomainError(f"this method reads samples, and the {name} is given by its moments alone.")
        values = torch.as_tensor(domain).detach().cpu().double()
        if values.dim() != 2 or len(values) < 2:
            raise DomainError(
                f"the {name} is a matrix (samples, dimensions) of two samples at least, found "
                f"{tuple(values.shape)}."
            )
        found.append(values)
    check_widths(found[0].shape[1], found[1].shape[1])
    return found[0], found[1]


def known_labels(labels: Labels | None, count: int, name: str) -> Tensor:
    """Labels as int64 (N,), all -1 where none are given.

    Raises:
        DomainError: there are not as many as samples.
    """
    if labels is None:
        return torch.full((count,), -1)
    found = torch.as_tensor(labels).detach().cpu().long()
    if found.shape != (count,):
        raise DomainError(f"the {name} has {count} samples and labels of the shape {tuple(found.shape)}.")
    return found


def source_labels_of(labels: Labels | None, count: int) -> Tensor:
    """The source's labels, int64 (N,), every one known.

    Raises:
        DomainError: one is missing.
    """
    found = known_labels(labels, count, "source")
    if bool((found < 0).any()):
        raise DomainError("this method needs the class of every source sample (source_labels).")
    return found


def check_widths(source: int, target: int) -> None:
    """`DomainError` where the domains' features do not live in the same space."""
    if source != target:
        raise DomainError(
            f"source features have {source} dimensions and target features {target}: a homogeneous method "
            f"needs the same space."
        )


def choose_dims(dims: int | None, most: int, variances: Tensor, share: float = 0.95) -> int:
    """How many components to keep.

    Args:
        dims: as asked for; None: as many as hold ``share`` of the variance.
        most: as many as there can be.
        variances: (D,), falling.

    Raises:
        DomainError: more than there can be.
    """
    if dims is not None:
        return check_dims(dims, most)
    sums = variances.clamp_min(0).cumsum(0)
    enough = int((sums < share * sums[-1]).sum()) + 1
    return max(1, min(enough, most))


def check_dims(dims: int, most: int) -> int:
    """The dimensions that were asked for; `DomainError` where there cannot be as many."""
    if not 1 <= dims <= most:
        raise DomainError(f"dims={dims}: there can be 1 to {most} here.")
    return dims
