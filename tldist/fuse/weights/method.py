"""What a fusion in weight space is: what it is told, what it sees of a tensor, how it merges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tldist.fuse.weights.linear import Array

Each = Callable[[Callable[[Array], Any], Sequence[Array]], Iterable[Any]]
"""``map``, or one that works on several models at once."""


@dataclass(frozen=True)
class Settings:
    """What methods may be told.

    Attributes:
        weights: one number a model, not negative, not all of them zero.
        alpha: how far to go from the base to the models, or from the first model to the second; 0 .. 1.
        scale: factor of the (summed or averaged) task vectors.
        density: share of a task vector's entries that stay.
        gamma: share of the largest that Breadcrumbs drops.
        reduce: factor of RegMean's inner products off the diagonal.
        seed: of random masks.
        coefficients: one number a model, by tensor name; learned ones.
    """

    weights: tuple[float, ...]
    alpha: float = 0.5
    scale: float = 1.0
    density: float = 1.0
    gamma: float = 0.0
    reduce: float = 1.0
    seed: int = 0
    coefficients: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def shares(self) -> tuple[float, ...]:
        """The weights, divided by their sum."""
        total = sum(self.weights)
        return tuple(weight / total for weight in self.weights)

    def only(self, models: Sequence[int]) -> Settings:
        """The settings for some of the models: of those that have a certain row."""
        weights = tuple(self.weights[place] for place in models)
        if not any(weights):
            weights = (1.0,) * len(models)
        chosen = {name: tuple(row[i] for i in models) for name, row in self.coefficients.items()}
        return replace(self, weights=weights, coefficients=chosen)


@dataclass(frozen=True)
class Piece:
    """A tensor of all models, or a piece of it.

    Attributes:
        name: of the tensor.
        models: one float32 array a model, of one shape.
        base: the common ancestor's; None without one.
        aids: the statistics that go with each model (Fisher information of the same shape, or a Gram
            matrix); empty for most methods.
        start: position of the piece's first entry in the flattened tensor.
    """

    name: str
    models: Sequence[Array]
    base: Array | None = None
    aids: Sequence[Array] = ()
    start: int = 0

    @property
    def origin(self) -> Array:
        """The base, of a method that cannot do without it."""
        assert self.base is not None
        return self.base


Merge = Callable[[Piece, Settings, Any], Array]
Survey = Callable[[Piece, Settings, Each], Any]


@dataclass(frozen=True)
class Method:
    """One fusion in weight space.

    Attributes:
        merge: (piece, settings, what the survey found) to the merged piece.
        survey: (whole tensor, settings, map) to what ``merge`` must know of it; None: each entry is merged
            for itself.
        uses: which settings it takes note of; ``base`` and ``weights`` among them.
        needs_base: whether it cannot do without ``base``.
        models: how many it merges: at least, at most.
        base_share: the base's share in the merged model, which its BatchNorm statistics get too.
        defaults: of ``scale``, ``density`` and ``gamma``, from the method's paper.
        aid: what it needs beside the weights: statistics of data, learned coefficients, or models whose
            hidden units were put into one order first.
        whole: whether ``merge`` must be given whole tensors in their own shape, not flat pieces.
    """

    merge: Merge
    survey: Survey | None = None
    uses: frozenset[str] = frozenset({"weights"})
    needs_base: bool = False
    models: tuple[int, int | None] = (1, None)
    base_share: Callable[[Settings], float] = lambda settings: 0.0
    defaults: Mapping[str, float] = field(default_factory=dict)
    aid: Literal["fisher", "gram", "coefficients", "alignment", None] = None
    whole: bool = False

    def apply(self, piece: Piece, settings: Settings) -> Array:
        """Merge a whole tensor at once: a pure function from tensors to a tensor."""
        facts = self.survey(piece, settings, map) if self.survey else None
        return self.merge(piece, settings, facts)


def _of_own(function: Callable[..., Array]) -> Merge:
    """A person's own: ``function(models, base, settings) -> array``, on whole tensors."""

    def merge(piece: Piece, settings: Settings, _: Any) -> Array:
        return np.asarray(function(list(piece.models), piece.base, settings), np.float32)

    return merge


def own_method(function: Callable[..., Array]) -> Method:
    """A function of one's own as a method: it sees whole tensors, and every setting."""
    uses = frozenset({"base", "weights", "alpha", "scale", "density", "gamma", "seed"})
    return Method(_of_own(function), uses=uses, whole=True)
