"""Features and labels as people have them, NumPy arrays or tensors, as checked tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tldist.errors import DomainError

Values = Tensor | np.ndarray
"""What a function on features takes: (N, D) of any number type."""

_CHUNK_NUMBERS = 1 << 22
"""Numbers of a matrix that are held at once (32 MiB in float64)."""


def as_features(values: Any, what: str = "the features", at_least: int = 1) -> Tensor:
    """float64 (N, D), on the device where ``values`` is.

    Args:
        values: an array or tensor (N, D) of numbers; not changed.
        what: what they are, for messages.
        at_least: rows that are needed.

    Raises:
        DomainError: another shape, too few rows, or numbers that are not finite.
    """
    if isinstance(values, Tensor):
        features = values.detach().to(torch.float64)
    else:
        try:
            features = torch.from_numpy(np.require(values, np.float64, ["C", "W"]))
        except (TypeError, ValueError) as error:
            raise DomainError(f"{what}: cannot be read as numbers: {error}.") from error
    if features.ndim != 2 or features.shape[1] == 0:
        raise DomainError(
            f"{what}: shape {tuple(features.shape)}, expected (N, D): one row of numbers for each image."
        )
    if len(features) < at_least:
        raise DomainError(f"{what}: {len(features)} rows, expected at least {at_least}.")
    bad = ~torch.isfinite(features).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise DomainError(
            f"{what}: {int(bad.sum())} rows hold NaN or infinity, the first is row {first}. Leave them out."
        )
    return features


def as_labels(values: Any, count: int, what: str = "the labels") -> Tensor:
    """int64 (N,), on the CPU.

    Args:
        values: class numbers from 0, one for each of ``count`` rows of features.
        count: N.
        what: what they are, for messages.

    Raises:
        DomainError: another shape, not whole numbers, or rows without a label (-1).
    """
    labels = values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    if labels.ndim != 1 or len(labels) != count:
        raise DomainError(
            f"{what}: shape {tuple(labels.shape)}, expected ({count},): one for each row of the features."
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise DomainError(f"{what}: {labels.dtype}, expected whole numbers: the classes' positions.")
    labels = labels.to(torch.int64)
    if (labels < 0).any():
        missing = int((labels < 0).sum())
        raise DomainError(f"{what}: {missing} rows have no label (a negative number). Leave them out.")
    return labels


def check_widths(source: int, target: int) -> None:
    """Refuse features of two widths: between them there is no distance.

    Raises:
        DomainError: the widths differ.
    """
    if source != target:
        raise DomainError(
            f"the source's features have {source} dimensions, the target's {target}. Only features of one "
            f"space can be compared; map both into a common one first."
        )


def like(result: Tensor, given: Any) -> Any:
    """``result`` in the kind of array that was given: a tensor for a tensor, else a NumPy array."""
    return result if isinstance(given, Tensor) else result.cpu().numpy()


def choose_rows(count: int, most: int, seed: int) -> Tensor:
    """Positions of at most ``most`` of ``count`` rows, drawn by ``seed``, rising; all where there are fewer.

    Depends on the three numbers alone, so a pass over batches can keep the chosen rows as they come by.
    """
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:most].sort().values


def blocks_of_rows(count: int, columns: int) -> list[slice]:
    """Slices over ``count`` rows of a matrix with so many columns, each small enough to be held at once."""
    size = max(1, _CHUNK_NUMBERS // max(1, columns))
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
