"""Permutation groups of a network as plain data, and tensors permuted by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tldist.errors import ModelError

Permutations = dict[str, np.ndarray]
"""For the name of a group, int64 (size,): the unit that comes to stand at each place."""


@dataclass(frozen=True)
class Place:
    """Where the units of a group lie in a tensor: unit u at ``offset + u * block`` and the places after it.

    Attributes:
        tensor: its name in the state dict.
        axis: of the tensor.
        offset: of the first unit, in positions on the axis.
        block: positions of one unit.
        learned: whether it is a parameter; False for a buffer, as BatchNorm's statistics are.
    """

    tensor: str
    axis: int
    offset: int = 0
    block: int = 1
    learned: bool = True


@dataclass(frozen=True)
class Tap:
    """Where the units of a group can be watched while the network runs.

    Attributes:
        module: its path.
        side: what is watched: the first ``input`` of the module, its ``output``, or the ``attention`` maps
            (N, heads, L, L) of an `nn.MultiheadAttention`.
        axis, offset, block: as in `Place`, of the watched tensor.
    """

    module: str
    side: str
    axis: int
    offset: int = 0
    block: int = 1


@dataclass(frozen=True)
class Group:
    """Units that are permuted together, everywhere at once, without a change of the network's function.

    Attributes:
        name: of the tensor that makes them, with its axis.
        size: how many units.
        places: all that hold them.
        taps: where they can be watched.
    """

    name: str
    size: int
    places: tuple[Place, ...]
    taps: tuple[Tap, ...] = ()


@dataclass(frozen=True)
class Spec:
    """The permutation groups of an architecture.

    Attributes:
        groups: in the order of the forward pass.
        share: how much of the network is in groups, 0 .. 1: the part of each parameter's output and input
            axes (its first two) that is, averaged over all numbers. Somewhat below 1 where all that can be
            is: the images and the classes keep their order.
    """

    groups: tuple[Group, ...]
    share: float = 1.0
    by_tensor: dict[str, list[tuple[Group, Place]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table: dict[str, list[tuple[Group, Place]]] = {}
        for group in self.groups:
            for place in group.places:
                table.setdefault(place.tensor, []).append((group, place))
        object.__setattr__(self, "by_tensor", table)


def identity(spec: Spec) -> Permutations:
    """The permutations that move nothing."""
    return {group.name: np.arange(group.size) for group in spec.groups}


def inverse(permutations: Permutations) -> Permutations:
    """The permutations that take every unit back to where it was."""
    return {name: np.argsort(order) for name, order in permutations.items()}


def unit_rows(tensor: Tensor, size: int, at: Place | Tap) -> Tensor:
    """The numbers of each unit: (size, M), where ``tensor`` has ``size`` units at a place or a tap."""
    part = tensor.movedim(at.axis, 0)[at.offset : at.offset + size * at.block]
    return part.reshape(size, -1)


def permute(tensors: Mapping[str, Tensor], spec: Spec, permutations: Permutations) -> dict[str, Tensor]:
    """Put the units of a model into another order; what it computes stays the same.

    Args:
        tensors: of a model by name, any types; left as they are.
        spec: the groups of its architecture.
        permutations: one a group.

    Returns:
        All tensors by name, of the same shapes and types; those that no group touches are the same objects.

    Raises:
        ModelError: a tensor of a group is missing.
    """
    missing = [name for name in spec.by_tensor if name not in tensors]
    if missing:
        raise ModelError(f"the tensor '{missing[0]}' is missing: these are not weights of this architecture.")
    return {
        name: permute_tensor(tensor, name, spec, permutations) if name in spec.by_tensor else tensor
        for name, tensor in tensors.items()
    }


def permute_tensor(
    tensor: Tensor, name: str, spec: Spec, permutations: Permutations, skip: int | None = None
) -> Tensor:
    """One tensor with its units in another order, on all axes but ``skip``."""
    orders: dict[int, np.ndarray] = {}
    for group, place in spec.by_tensor[name]:
        if place.axis == skip:
            continue
        order = orders.setdefault(place.axis, np.arange(tensor.shape[place.axis]))
        units = permutations[group.name][:, None] * place.block + np.arange(place.block)
        order[place.offset : place.offset + group.size * place.block] = place.offset + units.reshape(-1)
    for axis, order in orders.items():
        tensor = tensor.index_select(axis, torch.from_numpy(order).to(tensor.device))
    return tensor


def num_moved(permutations: Permutations) -> int:
    """How many units do not stay where they are."""
    return sum(int((order != np.arange(len(order))).sum()) for order in permutations.values())


def cosine(first: Mapping[str, Tensor], second: Mapping[str, Tensor], spec: Spec) -> float:
    """The cosine between two models' parameters, over the tensors of all groups; in float64, -1 .. 1."""
    products = np.zeros(3)
    for name, places in spec.by_tensor.items():
        if places[0][1].learned:
            a, b = (model[name].double().reshape(-1).cpu() for model in (first, second))
            products += [float(a @ b), float(a @ a), float(b @ b)]
    scale = float(np.sqrt(products[1] * products[2]))
    return float(products[0]) / scale if scale else 1.0
