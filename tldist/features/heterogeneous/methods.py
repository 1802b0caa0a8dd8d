"""Heterogeneous alignments by name, from pairs of features to the maps that bring them together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tldist.features.arrays import Values
from tldist.features.heterogeneous.cca import fit_cca
from tldist.features.heterogeneous.paired import Maps, PairedMoments
from tldist.features.heterogeneous.procrustes import fit_procrustes
from tldist.features.heterogeneous.ridge import fit_ridge
from tldist.methods import find_method


@dataclass(frozen=True)
class PairMethod:
    """One heterogeneous alignment.

    Attributes:
        fit: (pairs, ridge) to the maps.
        ridge: the strength of its regularisation where none is asked for; None: it chooses by itself.
        pairs_are: ``samples`` (the same ones in both domains) or ``classes`` (their means: it reads the
            labels of the target).
        uses_ridge: whether it has a regularisation.
    """

    fit: Callable[[PairedMoments, float | None], Maps]
    ridge: float | None = None
    pairs_are: str = "samples"
    uses_ridge: bool = True


def _cca(pairs: PairedMoments, ridge: float | None) -> Maps:
    return fit_cca(pairs, ridge=CCA_RIDGE if ridge is None else ridge, power=CCA_POWER)


def _procrustes(pairs: PairedMoments, ridge: float | None) -> Maps:
    del ridge  # an isometry has nothing to shrink
    return fit_procrustes(pairs)


CCA_RIDGE, CCA_POWER = 0.1, 1.0

METHODS: dict[str, PairMethod] = {
    "ridge": PairMethod(fit_ridge),
    "procrustes": PairMethod(_procrustes, uses_ridge=False),
    "cca": PairMethod(_cca, ridge=CCA_RIDGE),
    "anchors": PairMethod(_procrustes, pairs_are="classes", uses_ridge=False),
}
"""The family of heterogeneous alignments, by the name that ``method=`` takes."""


def fit_pairs(source: Values, target: Values, method: str = "ridge", ridge: float | None = None) -> Maps:
    """Fit a method on paired features that are in memory.

    Args:
        source, target: (N, D) and (N, E), row by row the same samples (or the means of the same classes:
            `tldist.features.heterogeneous.anchors`).
        method: a key of `METHODS`, or ``package.module:function`` of (pairs, ridge).
        ridge: the strength of its regularisation; None: the method's own.

    Raises:
        RecipeError: an unknown method.
        DomainError: too few pairs, or rows that do not match.
    """
    found = find_method(method, METHODS, PairMethod)
    return found.fit(PairedMoments.from_batch(source, target), found.ridge if ridge is None else ridge)
