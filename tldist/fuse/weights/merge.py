"""Merge one tensor of all models, given as arrays: by the policy of its kind, or row by row of a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tldist.errors import ModelError
from tldist.fuse.weights.linear import Array
from tldist.fuse.weights.method import Method, Piece, Settings
from tldist.fuse.weights.methods import METHODS
from tldist.fuse.weights.policy import (
    Kind,
    common_constant,
    largest_count,
    pooled_mean,
    pooled_variance,
)
from tldist.fuse.weights.rows import RowPlan


def merge_by_policy(
    name: str,
    kind: Kind,
    values: Sequence[NDArray[Any]],
    shares: Sequence[float],
    means: Sequence[NDArray[Any]] = (),
) -> NDArray[Any]:
    """Merge what is not learned.

    Args:
        name: of the tensor.
        kind: any but learned.
        values: of all models that have a share, the base first.
        shares: theirs, sum 1.
        means: of the same BatchNorm layers, for variances.
    """
    if kind == "counter":
        return largest_count(values)
    if kind == "running_mean":
        return pooled_mean(values, shares)
    if kind == "running_var":
        return pooled_variance(means, values, shares)
    return common_constant(name, values)


def merge_rows(method: Method, piece: Piece, settings: Settings, plan: RowPlan) -> Array:
    """Merge the heads of models that know different classes.

    Classes that the same models know are merged by the method as one tensor. Where the method cannot (it
    needs the base, and that does not know them; or two models, and one knows them), the rows of those models
    are averaged.

    Args:
        method, settings: of the fusion.
        piece: the whole tensor; its arrays may have different numbers of rows.
        plan: whose rows go where.
    """
    result = np.zeros((plan.count, *piece.models[0].shape[1:]), piece.models[0].dtype)
    for group in plan.groups:
        models = [piece.models[number][list(rows)] for number, rows in zip(group.models, group.rows)]
        base = piece.base[list(group.base)] if piece.base is not None and group.base else None
        fits = base is not None or not method.needs_base
        low, high = method.models
        fits = fits and low <= len(models) <= (high or len(models))
        aids = [piece.aids[number] for number in group.models] if piece.aids else []
        if method.aid == "fisher":  # one number an entry; inner products are of the layer's inputs
            aids = [aid[list(rows)] for aid, rows in zip(aids, group.rows)]
        rule = method if fits else METHODS["average"]
        part = Piece(piece.name, models, base, aids)
        result[list(group.out)] = rule.apply(part, settings.only(group.models))
    return result


def check_finite_values(name: str, values: NDArray[Any]) -> None:
    """Refuse NaN and infinity.

    Raises:
        ModelError: names the tensor.
    """
    if not np.isfinite(values).all():
        raise ModelError(
            f"the merged model is refused: its tensor {name} holds NaN or infinity. Check the models it was "
            f"made from with tldist evaluate; nothing was written."
        )


def model_shares(method: Method, settings: Settings, has_base: bool) -> tuple[float, ...]:
    """The shares of all models in the result, of sum 1: the base's first, where there is one."""
    base = method.base_share(settings) if has_base else 0.0
    models = tuple((1 - base) * share for share in settings.shares)
    return (base, *models) if has_base else models
