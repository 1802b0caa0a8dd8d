"""Weight matching: the order of a model's units in which its weights are most like another model's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from tldist.data.order import seed_of
from tldist.fuse.rebasin.spec import Group, Permutations, Place, Spec, identity, permute_tensor, unit_rows

_TINY = 1e-12
"""What a gain must be, relative to the size of the numbers, so that rounding does not pass for one."""


@dataclass(frozen=True)
class _Pair:
    """Two models to be matched, and the device that computes their inner products."""

    reference: Mapping[str, Tensor]
    other: Mapping[str, Tensor]
    spec: Spec
    device: torch.device

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """A tensor of both, in float64."""
        return (
            self.reference[name].to(self.device, torch.float64),
            self.other[name].to(self.device, torch.float64),
        )


def match_weights(
    reference: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    spec: Spec,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Permutations:
    """The permutations of ``other`` that bring its parameters closest to those of ``reference``.

    Algorithm 1 of arXiv:2209.04836: coordinate descent on the sum of inner products of all parameters, one
    linear assignment a group with the others fixed, in a random order, until no group gains any more. The
    descent finds a local optimum, so it is made twice: from the order that is there, as in the paper, and
    from one found layer by layer from the images on (each by what is in order before it). The better result
    is taken. Parameters count, BatchNorm's scales and shifts among them; buffers do not.

    Args:
        reference, other: tensors of two models of one architecture, by name, in any floating type.
        spec: of the architecture.
        seed: of the order in which groups are taken.
        device: computes the inner products, in float64.

    Returns:
        For `permute`, of ``other``.
    """
    pair = _Pair(reference, other, spec, torch.device(device))
    ends = [_descend(pair, start, seed) for start in (identity(spec), _layer_by_layer(pair))]
    return max(ends, key=lambda end: total_similarity(pair, spec.by_tensor, end))


def _layer_by_layer(pair: _Pair) -> Permutations:
    """A start: every group by those of its tensors in which the others are in order already."""
    found: Permutations = {}
    for group in pair.spec.groups:
        places = [place for place in group.places if _others(pair.spec, place) <= found.keys()]
        found[group.name] = _assign(similarity(pair, group, places, found))
    return found


def _others(spec: Spec, place: Place) -> set[str]:
    """The groups on the other axes of a tensor."""
    return {group.name for group, near in spec.by_tensor[place.tensor] if near.axis != place.axis}


def _depends_on(spec: Spec, group: Group) -> set[str]:
    """The groups whose order the problem of a group depends on (and the other way round)."""
    return {name for place in group.places if place.learned for name in _others(spec, place)}


def _descend(pair: _Pair, start: Permutations, seed: int) -> Permutations:
    """Coordinate descent until no group gains.

    A group is looked at again only when one that its problem depends on has moved.
    """
    random = np.random.Generator(np.random.PCG64(seed_of("rebasin", seed)))
    groups = {group.name: group for group in pair.spec.groups}
    near = {name: sorted(_depends_on(pair.spec, group)) for name, group in groups.items()}
    found, waiting = dict(start), dict.fromkeys(groups)
    while waiting:
        for name in random.permutation(list(waiting)).tolist():
            del waiting[name]
            better = _improve(pair, groups[name], found)
            if better is not None:
                found[name] = better
                waiting.update(dict.fromkeys(near[name]))
    return found


def _improve(pair: _Pair, group: Group, current: Permutations) -> np.ndarray | None:
    """A better order of one group's units, the others fixed; None if there is none."""
    scores = similarity(pair, group, group.places, current)
    order = _assign(scores)
    before, after = _sum_of(scores, current[group.name]), _sum_of(scores, order)
    tensors = [place.tensor for place in group.places if place.learned]
    if any(group.name in _others(pair.spec, place) for place in group.places):
        # On two axes of one tensor the assignment solves a linearised problem: the sum itself must grow,
        # or the descent might never end.
        before = total_similarity(pair, tensors, current)
        after = total_similarity(pair, tensors, {**current, group.name: order})
    return order if after - before > _TINY * float(np.abs(scores).max(axis=1).sum()) else None


def _assign(scores: np.ndarray) -> np.ndarray:
    """The order of the columns in which the diagonal has the largest sum."""
    order: np.ndarray = linear_sum_assignment(scores, maximize=True)[1]
    return order


def _sum_of(scores: np.ndarray, order: np.ndarray) -> float:
    return float(scores[np.arange(len(order)), order].sum())


def similarity(pair: _Pair, group: Group, places: Sequence[Place], current: Permutations) -> np.ndarray:
    """The inner product of each unit of the reference with each of the other model.

    Args:
        pair: the models.
        group: whose units.
        places: where they are compared; buffers are left out.
        current: how the other groups are permuted.

    Returns:
        float64 (size, size); rows: the reference's units, columns: the other's, in their first order.
    """
    scores = torch.zeros(group.size, group.size, dtype=torch.float64, device=pair.device)
    for place in places:
        if place.learned:
            mine, theirs = pair.read(place.tensor)
            theirs = permute_tensor(theirs, place.tensor, pair.spec, current, skip=place.axis)
            scores += unit_rows(mine, group.size, place) @ unit_rows(theirs, group.size, place).T
    return scores.cpu().numpy()


def total_similarity(pair: _Pair, tensors: Iterable[str], permutations: Permutations) -> float:
    """The inner product of the two models' parameters in some tensors, the other model's permuted."""
    total = 0.0
    for name in dict.fromkeys(tensors):
        if pair.spec.by_tensor[name][0][1].learned:
            mine, theirs = pair.read(name)
            total += float((mine * permute_tensor(theirs, name, pair.spec, permutations)).sum())
    return total
