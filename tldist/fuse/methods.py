"""Fusion methods: pure functions from the tensors of several models to one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """What methods may be told.

    Attributes:
        shares: one number a model, not negative, of sum 1.
        alpha: how far to go from the base to the models, 0 .. 1.
    """

    shares: tuple[float, ...]
    alpha: float = 0.5


@dataclass(frozen=True)
class Method:
    """One fusion.

    Attributes:
        merge: (tensors, the base's tensor or None, settings) to the merged tensor; all of one shape, float64.
        uses: which of ``base``, ``weights`` and ``alpha`` it takes note of.
        needs_base: whether it cannot do without ``base``.
        base_share: the base's share in the merged model, which its BatchNorm statistics get too.
    """

    merge: Callable[[Sequence[Tensor], Tensor | None, Settings], Tensor]
    uses: frozenset[str] = frozenset({"base", "weights", "alpha"})
    needs_base: bool = False
    base_share: Callable[[Settings], float] = lambda settings: 0.0


def average(models: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """``sum_i shares_i * models_i``: the uniform (or weighted) model soup of arXiv:2203.05482."""
    return torch.stack([share * model for share, model in zip(shares, models)]).sum(0)


def wise_ft(models: Sequence[Tensor], base: Tensor, shares: Sequence[float], alpha: float) -> Tensor:
    """``(1 - alpha) * base + alpha * fine-tuned``, eq. 1 of arXiv:2109.01903; of several, their average."""
    return (1 - alpha) * base + alpha * average(models, shares)


def _average(models: Sequence[Tensor], base: Tensor | None, settings: Settings) -> Tensor:
    return average(models, settings.shares)


def _wise_ft(models: Sequence[Tensor], base: Tensor | None, settings: Settings) -> Tensor:
    assert base is not None
    return wise_ft(models, base, settings.shares, settings.alpha)


METHODS: dict[str, Method] = {
    "average": Method(_average, uses=frozenset({"weights"})),
    "wise_ft": Method(_wise_ft, needs_base=True, base_share=lambda settings: 1 - settings.alpha),
}
"""The family of fusions, by the name that ``method=`` takes."""


def model_shares(method: Method, settings: Settings, has_base: bool) -> tuple[float, ...]:
    """The shares of all models in the result, of sum 1: the base's first, where there is one."""
    base = method.base_share(settings) if has_base else 0.0
    models = tuple((1 - base) * share for share in settings.shares)
    return (base, *models) if has_base else models
