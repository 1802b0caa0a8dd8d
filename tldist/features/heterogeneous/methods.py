"""Heterogeneous alignments by name, from pairs of features to the maps that bring them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tldist.errors import DomainError
from tldist.features.arrays import Values
from tldist.features.cross_moments import CrossMoments
from tldist.features.heterogeneous.cca import fit_cca
from tldist.features.heterogeneous.maps import Into, Maps
from tldist.features.heterogeneous.procrustes import fit_procrustes
from tldist.features.heterogeneous.ridge import fit_ridge
from tldist.methods import find_method


@dataclass(frozen=True)
class PairMethod:
    """One heterogeneous alignment.

    Attributes:
        fit: (pairs, ridge, into) to the maps.
        ridge: the strength of its regularisation where none is asked for; None: it chooses by itself.
        uses_ridge: whether it has a regularisation.
        uses_into: whether it maps one side only, and can do so either way.
        pairs_are: ``samples`` (the same ones in both domains) or ``anchors`` (labelled target samples with
            the means of their classes: `tldist.features.heterogeneous.anchors.pair_anchors`).
    """

    fit: Callable[[CrossMoments, float | None, Into], Maps]
    ridge: float | None = None
    uses_ridge: bool = True
    uses_into: bool = True
    pairs_are: Literal["samples", "anchors"] = "samples"


def _ridge(pairs: CrossMoments, ridge: float | None, into: Into) -> Maps:
    return fit_ridge(pairs, ridge, into=into)


def _procrustes(pairs: CrossMoments, ridge: float | None, into: Into) -> Maps:
    del ridge  # an isometry has nothing to shrink
    return fit_procrustes(pairs, into=into)


def _cca(pairs: CrossMoments, ridge: float | None, into: Into) -> Maps:
    del into  # both sides are mapped
    return fit_cca(pairs, ridge=CCA_RIDGE if ridge is None else ridge, power=CCA_POWER)


def _anchors(pairs: CrossMoments, ridge: float | None, into: Into) -> Maps:
    del into  # the source's means are the answers of the regression
    return fit_ridge(pairs, ridge, into="source")


CCA_RIDGE, CCA_POWER = 0.03, 2.0
"""Good from 20 to 4,000 pairs of features of 64 and 128 dimensions (two networks on digits)."""

METHODS: dict[str, PairMethod] = {
    "ridge": PairMethod(_ridge),
    "procrustes": PairMethod(_procrustes, uses_ridge=False),
    "cca": PairMethod(_cca, ridge=CCA_RIDGE, uses_into=False),
    "anchors": PairMethod(_anchors, uses_into=False, pairs_are="anchors"),
}
"""The family of heterogeneous alignments, by the name that ``method=`` takes."""


def fit_pairs(
    source: Values,
    target: Values,
    method: str = "ridge",
    *,
    ridge: float | None = None,
    into: Into = "source",
) -> Maps:
    """Fit a method on paired features that are in memory.

    Args:
        source, target: (N, D) and (N, E), row by row the same samples (for anchors: use `pair_anchors` and
            the method's own ``fit``).
        method: a key of `METHODS`, or ``package.module:function`` of (pairs, ridge, into).
        ridge: the strength of its regularisation; None: the method's own.
        into: whose features are the common space, where it maps one side only.

    Raises:
        RecipeError: an unknown method.
        DomainError: too few pairs, or rows that do not match.
    """
    found = find_method(method, METHODS, PairMethod)
    if len(source) != len(target):
        raise DomainError(f"{len(source)} source and {len(target)} target rows: pairs need one of each.")
    pairs = CrossMoments.from_batch(source, target)
    return found.fit(pairs, found.ridge if ridge is None else ridge, into)
