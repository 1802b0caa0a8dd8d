"""The fusions in weight space, by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from tldist.fuse.weights.method import Each, Method, Piece, Settings
from tldist.fuse.weights.sparse import (
    dropped,
    elected_sum,
    magnitude_band,
    random_mask,
    top_band,
    trimmed,
    weighted_sum,
)


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
