"""What fusion does with each kind of tensor: learned numbers, BatchNorm statistics, counters, constants."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch
from torch import Tensor

from tldist.errors import BundleError

Kind = Literal["learned", "running_mean", "running_var", "counter", "constant"]

_MEAN, _VAR, _COUNT = "running_mean", "running_var", "num_batches_tracked"


def kind_of(name: str, dtype: torch.dtype, names: Collection[str]) -> Kind:
    """The kind of a tensor, by its name, its type, and the names beside it.

    Floating numbers are learned, unless a mean and a variance lie side by side under BatchNorm's names.
    """
    prefix, _, leaf = name.rpartition(".")
    sibling = {_MEAN: _VAR, _VAR: _MEAN}.get(leaf)
    if sibling and f"{prefix}.{sibling}" in names:
        return "running_mean" if leaf == _MEAN else "running_var"
    if leaf == _COUNT:
        return "counter"
    return "learned" if dtype.is_floating_point else "constant"


def pooled_mean(means: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The mean of a mixture: ``sum_i s_i mu_i``. Shares have sum 1."""
    return torch.stack([share * mean for share, mean in zip(shares, means)]).sum(0)


def pooled_variance(means: Sequence[Tensor], variances: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """The variance of a mixture: ``sum_i s_i (var_i + mu_i^2) - mu^2``.

    Computed as ``sum_i s_i (var_i + (mu_i - mu)^2)``: the same number, and never negative. Shares have sum 1.
    """
    centre = pooled_mean(means, shares)
    parts = [share * (var + (mean - centre) ** 2) for share, mean, var in zip(shares, means, variances)]
    return torch.stack(parts).sum(0)


def merge_tensor(
    name: str,
    names: Collection[str],
    read: Callable[[str], list[Tensor]],
    shares: Sequence[float],
    merge: Callable[[list[Tensor]], Tensor],
) -> Tensor:
    """Merge one tensor of all models by the policy of its kind.

    Args:
        name: of the tensor.
        names: of all tensors of a model.
        read: the tensors of that name, one a model.
        shares: of the models, sum 1; for statistics.
        merge: the method, from float64 tensors to one; for learned numbers.

    Returns:
        The merged tensor, of the widest type among the models'.

    Raises:
        BundleError: constants that differ between the models.
    """
    tensors = read(name)
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    kind = kind_of(name, dtype, names)
    if kind == "counter":
        return torch.stack(tensors).amax(0)
    if kind == "constant":
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
            raise BundleError(f"the constant '{name}' differs between the models: they cannot be merged.")
        return tensors[0]
    wide = [tensor.double() for tensor in tensors]  # exact for equal models, whatever their number
    if kind == "running_mean":
        return pooled_mean(wide, shares).to(dtype)
    if kind == "running_var":
        means = [tensor.double() for tensor in read(f"{name.removesuffix(_VAR)}{_MEAN}")]
        return pooled_variance(means, wide, shares).to(dtype)
    return merge(wide).to(dtype)
