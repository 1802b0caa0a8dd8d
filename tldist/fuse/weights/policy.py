"""What fusion does with each kind of tensor: learned numbers, BatchNorm statistics, counters, constants."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tldist.errors import BundleError
from tldist.fuse.weights.files import FLOATING

Kind = Literal["learned", "running_mean", "running_var", "counter", "constant"]

MEAN, VAR, COUNT = "running_mean", "running_var", "num_batches_tracked"


def kind_of(name: str, dtype: str, names: Collection[str]) -> Kind:
    """The kind of a tensor, by its name, its type (safetensors' name), and the names beside it.

    Floating numbers are learned, unless a mean and a variance lie side by side under BatchNorm's names.
    """
    leaf = name.rpartition(".")[2]
    sibling = {MEAN: VAR, VAR: MEAN}.get(leaf)
    if sibling and beside(name, sibling) in names:
        return "running_mean" if leaf == MEAN else "running_var"
    if leaf == COUNT:
        return "counter"
    return "learned" if dtype in FLOATING else "constant"


def beside(name: str, leaf: str) -> str:
    """The name of another tensor of the same module."""
    prefix, dot, _ = name.rpartition(".")
    return f"{prefix}{dot}{leaf}"


def widest(dtypes: Sequence[str]) -> str:
    """The type of the merged tensor: the models' own where they agree, else F64 where one has it, else F32.

    Of numbers; other types must agree.
    """
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return "F64" if "F64" in dtypes else "F32"


def pooled_mean(means: Sequence[NDArray[Any]], shares: Sequence[float]) -> NDArray[np.float64]:
    """The mean of a mixture: ``sum_i s_i mu_i``. Shares have sum 1."""
    first = means[0].astype(np.float64)
    return sum((share * (mean - first) for share, mean in zip(shares, means)), start=first)


def pooled_variance(
    means: Sequence[NDArray[Any]], variances: Sequence[NDArray[Any]], shares: Sequence[float]
) -> NDArray[np.float64]:
    """The variance of a mixture: ``sum_i s_i (var_i + mu_i^2) - mu^2``.

    Computed as ``sum_i s_i (var_i + (mu_i - mu)^2)``: the same number, and never negative. Shares have sum 1.
    """
    centre = pooled_mean(means, shares)
    spread = [share * (mean - centre) ** 2 for share, mean in zip(shares, means)]
    return pooled_mean(variances, shares) + np.sum(spread, axis=0)


def largest_count(counts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """Of batches that BatchNorm layers have seen: the most that any model's has."""
    return np.max(np.stack(counts), axis=0)


def common_constant(name: str, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """What no model learned, and all have alike.

    Raises:
        BundleError: it differs.
    """
    if any(not np.array_equal(value, values[0]) for value in values[1:]):
        raise BundleError(f"the constant '{name}' differs between the models: they cannot be merged.")
    return values[0]
