"""The fusions in weight space, by name: what each must know of whole tensors first, and how it merges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tldist.fuse.weights.informed import fisher_average, regmean
from tldist.fuse.weights.linear import (
    Array,
    average,
    combination,
    gram,
    model_stock_ratio,
    multi_slerp_coefficients,
    slerp_coefficients,
    task_arithmetic,
    wise_ft,
)
from tldist.fuse.weights.sparse import (
    dropped,
    elected_sum,
    magnitude_band,
    random_mask,
    top_band,
    trimmed,
    weighted_sum,
)

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


def _summed(deltas: Sequence[Array], piece: Piece, settings: Settings) -> Array:
    return weighted_sum(deltas, piece.origin, settings.weights, settings.scale)


def _elected(deltas: Sequence[Array], piece: Piece, settings: Settings, *, mean: bool) -> Array:
    return elected_sum(deltas, piece.origin, settings.weights, settings.scale, mean=mean)


def _in_bands(piece: Piece, bands: Sequence[Any]) -> list[Array]:
    return [trimmed(model, piece.origin, band) for model, band in zip(piece.models, bands)]


def _at_random(piece: Piece, settings: Settings) -> list[Array]:
    deltas = []
    for place, model in enumerate(piece.models):
        key = (settings.seed, piece.name, place)
        mask = random_mask(key, piece.start, model.shape, settings.density)
        deltas.append(dropped(model, piece.origin, mask, settings.density))
    return deltas


def _top_bands(piece: Piece, settings: Settings, each: Each) -> list[Any]:
    return list(each(lambda model: top_band(model, piece.origin, settings.density), piece.models))


def _middle_bands(piece: Piece, settings: Settings, each: Each) -> list[Any]:
    density, gamma = settings.density, settings.gamma
    return list(each(lambda model: magnitude_band(model, piece.origin, density, gamma), piece.models))


def _slerp(piece: Piece, settings: Settings, _: Each) -> tuple[float, ...]:
    return slerp_coefficients(gram(piece.models, None), settings.alpha)


def _multi_slerp(piece: Piece, settings: Settings, _: Each) -> tuple[float, ...]:
    return multi_slerp_coefficients(gram(piece.models, piece.base), settings.shares)


def _merge_multi_slerp(piece: Piece, _: Settings, coefficients: Sequence[float]) -> Array:
    return combination(piece.models, piece.base, coefficients, 1 - sum(coefficients))


def _stock(piece: Piece, _: Settings, __: Each) -> float:
    return model_stock_ratio(gram(piece.models, piece.base))


def _learned(piece: Piece, settings: Settings, _: Any) -> Array:
    own = settings.coefficients.get(piece.name) or [settings.scale * w for w in settings.weights]
    return task_arithmetic(piece.models, piece.origin, own)


def _of_own(function: Callable[..., Array]) -> Merge:
    """A person's own: ``function(models, base, settings) -> array``, on whole tensors."""

    def merge(piece: Piece, settings: Settings, _: Any) -> Array:
        return np.asarray(function(list(piece.models), piece.base, settings), np.float32)

    return merge


def own_method(function: Callable[..., Array]) -> Method:
    """A function of one's own as a method: it sees whole tensors, and every setting."""
    uses = frozenset({"base", "weights", "alpha", "scale", "density", "gamma", "seed"})
    return Method(_of_own(function), uses=uses, whole=True)


_VECTORS = frozenset({"base", "weights", "scale"})


def _what_is_left(settings: Settings) -> float:
    """Of the base, when task vectors are added to it."""
    return max(0.0, 1 - settings.scale * sum(settings.weights))


METHODS: dict[str, Method] = {
    "average": Method(lambda piece, s, _: average(piece.models, s.shares)),
    "wise_ft": Method(
        lambda piece, s, _: wise_ft(piece.models, piece.origin, s.shares, s.alpha),
        uses=frozenset({"base", "weights", "alpha"}),
        needs_base=True,
        base_share=lambda s: 1 - s.alpha,
    ),
    "slerp": Method(
        lambda piece, s, coefficients: combination(piece.models, None, coefficients, 0),
        survey=_slerp,
        uses=frozenset({"alpha"}),
        models=(2, 2),
    ),
    "multi_slerp": Method(_merge_multi_slerp, survey=_multi_slerp, uses=frozenset({"base", "weights"})),
    "task_arithmetic": Method(
        lambda piece, s, _: task_arithmetic(piece.models, piece.origin, [s.scale * w for w in s.weights]),
        uses=_VECTORS,
        needs_base=True,
        defaults={"scale": 0.4},
        base_share=_what_is_left,
    ),
    "ties": Method(
        lambda piece, s, bands: _elected(_in_bands(piece, bands), piece, s, mean=True),
        survey=_top_bands,
        uses=_VECTORS | {"density"},
        needs_base=True,
        defaults={"density": 0.2, "scale": 1.0},
    ),
    "dare_linear": Method(
        lambda piece, s, _: _summed(_at_random(piece, s), piece, s),
        uses=_VECTORS | {"density", "seed"},
        needs_base=True,
        defaults={"density": 0.5, "scale": 0.4},
        base_share=_what_is_left,
    ),
    "dare_ties": Method(
        lambda piece, s, _: _elected(_at_random(piece, s), piece, s, mean=False),
        uses=_VECTORS | {"density", "seed"},
        needs_base=True,
        defaults={"density": 0.5, "scale": 0.4},
    ),
    "breadcrumbs": Method(
        lambda piece, s, bands: _summed(_in_bands(piece, bands), piece, s),
        survey=_middle_bands,
        uses=_VECTORS | {"density", "gamma"},
        needs_base=True,
        defaults={"density": 0.85, "gamma": 0.01, "scale": 0.4},
        base_share=_what_is_left,
    ),
    "model_stock": Method(
        lambda piece, s, ratio: wise_ft(piece.models, piece.origin, s.shares, ratio),
        survey=_stock,
        uses=frozenset({"base"}),
        needs_base=True,
        models=(2, None),
    ),
    "fisher": Method(
        lambda piece, s, _: (
            fisher_average(piece.models, piece.aids, s.shares)
            if piece.aids
            else average(piece.models, s.shares)
        ),
        aid="fisher",
    ),
    "regmean": Method(
        lambda piece, s, _: (
            regmean(piece.models, piece.aids, s.shares, s.reduce)
            if piece.aids
            else average(piece.models, s.shares)
        ),
        uses=frozenset({"weights", "reduce"}),
        aid="gram",
        whole=True,
    ),
    "rebasin": Method(
        lambda piece, s, _: average(piece.models, s.shares),
        uses=frozenset({"weights", "match"}),
        models=(2, None),
        aid="alignment",
    ),
    "adamerging": Method(
        _learned,
        uses=_VECTORS,
        needs_base=True,
        defaults={"scale": 0.3},
        aid="coefficients",
        base_share=_what_is_left,
    ),
}
"""The family of fusions in weight space, by the name that ``method=`` takes."""
