"""The family of homogeneous alignments, and what each reads of the two domains."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tldist.align.components import jda, tca
from tldist.align.fit import Data, Fit, Labels
from tldist.align.gaussian import coral, monge, pca, standardize, whiten
from tldist.align.learned import mlp
from tldist.align.subspaces import gfk, subspace
from tldist.align.transport import ot
from tldist.errors import RecipeError
from tldist.features.moments import Moments

__all__ = [
    "METHODS",
    "Fit",
    "Method",
    "coral",
    "gfk",
    "jda",
    "mlp",
    "monge",
    "none",
    "ot",
    "pca",
    "standardize",
    "subspace",
    "tca",
    "whiten",
]

_LABELS = ("source_labels", "target_labels")


@dataclass(frozen=True)
class Method:
    """One alignment.

    A function of one's own, ``f(source, target, *, ridge=..., ...) -> Fit``, reads moments; it is made to
    read samples by putting ``Method(f, reads="samples")`` where ``method=package.module:name`` finds it.

    Attributes:
        fit: of the source, the target, and options by keyword; with ``source_labels`` and
            ``target_labels`` among its arguments it is given those.
        reads: what it is given of a domain: its moments, at any size in one pass, or samples.
        moment_kinds: values of the option ``kind`` with which it reads moments all the same.
        uses_covariance: whether it reads more of the moments than means and variances.
    """

    fit: Callable[..., Fit]
    reads: Literal["moments", "samples"] = "moments"
    moment_kinds: tuple[str, ...] = ()
    uses_covariance: bool = True

    def __call__(
        self, source: Moments | Data, target: Moments | Data, *labels: Labels, **options: Any
    ) -> Fit:
        """Fit on both domains."""
        return self.fit(source, target, *labels, **options)

    @property
    def options(self) -> dict[str, Any]:
        """Names and defaults of the options that it has, as its function says them."""
        found = inspect.signature(self.fit).parameters.values()
        return {p.name: p.default for p in found if p.default is not p.empty and p.name not in _LABELS}

    @property
    def labels(self) -> tuple[str, ...]:
        """Which labels it is given: of the source, of the target, both or none."""
        return tuple(name for name in _LABELS if name in inspect.signature(self.fit).parameters)

    def needs_samples(self, options: Mapping[str, Any]) -> bool:
        """Whether it is given samples with these options, and not moments."""
        return self.reads == "samples" and options.get("kind") not in self.moment_kinds

    def check_options(self, name: str, given: Mapping[str, Any]) -> None:
        """`RecipeError` where an option is given that the method does not have."""
        odd = [option for option in given if option not in self.options]
        if odd:
            known = ", ".join(self.options) or "none"
            raise RecipeError(
                f"{odd[0]}={given[odd[0]]}: method={name} has no such option (it has: {known})."
            )


def none(source: Moments | Data, target: Moments | Data) -> Fit:
    """No map: the head alone is refitted, perhaps with weights."""
    return Fit(None, None)


METHODS: dict[str, Method] = {
    "none": Method(none, uses_covariance=False),
    "standardize": Method(standardize, uses_covariance=False),
    "pca": Method(pca),
    "whiten": Method(whiten),
    "coral": Method(coral),
    "monge": Method(monge),
    "subspace": Method(subspace),
    "gfk": Method(gfk),
    "tca": Method(tca, reads="samples", moment_kinds=("linear",)),
    "jda": Method(jda, reads="samples"),
    "mlp": Method(mlp, reads="samples"),
    "ot": Method(ot, reads="samples"),
}
"""By the name that ``method=`` takes."""


def all_finite(fit: Fit) -> bool:
    """Whether every number of the maps is finite."""
    tensors = [t for part in (fit.source, fit.target) if part is not None for t in part.buffers()]
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
