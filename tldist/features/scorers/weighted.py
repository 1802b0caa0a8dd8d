"""Errors on labelled source images, weighted by how much each looks like the target."""

from __future__ import annotations

import torch
from torch import Tensor

from tldist.features.arrays import Values, as_features, check_widths, choose_rows
from tldist.features.heads import fit_logistic

_MOST_LOG = 30.0
"""Of a weight's logarithm; beyond it the domains are told apart without error."""


def importance_weights(
    source: Values, target: Values, at: Values, *, l2: float = 1e-2, most: int = 5000, seed: int = 0
) -> Tensor:
    """The density of the target over that of the source, at given features.

    By a classifier of the domains: ``(N_S / N_T) p(target | x) / p(source | x)``, as DEV (You et al., ICML
    2019) has it; multinomial logistic regression.

    Args:
        source, target: (N, D) and (M, D), that fit the classifier; not those of ``at``.
        at: (P, D), source features held out.
        l2: strength of the classifier's penalty (`tldist.features.heads.fit_logistic`).
        most: rows of each domain that fit it, drawn by ``seed``.
        seed: of the choice of rows.

    Returns:
        float64 (P,), positive.
    """
    first = as_features(source, "the source's features")
    second = as_features(target, "the target's features")
    points = as_features(at, "the held-out source features")
    check_widths(first.shape[1], second.shape[1])
    check_widths(points.shape[1], second.shape[1])
    parts = [a[choose_rows(len(a), most, seed).to(a.device)].cpu() for a in (first, second)]
    labels = torch.cat([torch.full((len(part),), place) for place, part in enumerate(parts)])
    head = fit_logistic(torch.cat(parts), labels, 2, l2=l2)
    logits = head.logits(points.cpu())
    return (logits[:, 1] - logits[:, 0]).clamp(-_MOST_LOG, _MOST_LOG).exp() * len(parts[0]) / len(parts[1])


def effective_count(weights: Tensor) -> float:
    """Kish's effective number of images: how many equal weights would say as much."""
    return float(weights.sum().square() / weights.square().sum())


def importance_weighted_risk(weights: Tensor, losses: Tensor) -> float:
    """The weighted mean of losses; small is good.

    Importance-weighted validation: Sugiyama et al. (JMLR 8, 2007), with the weights made to sum to 1:
    where all source images look unlike the target, their sum says nothing of the losses.

    Args:
        weights: float64 (P,), of `importance_weights`.
        losses: (P,), on the same images.
    """
    return float((weights * losses).sum() / weights.sum())


def dev_risk(weights: Tensor, losses: Tensor) -> float:
    """The weighted risk with a control variate: less variance, the same mean; small is good.

    DEV (You et al., ICML 2019), algorithm 1: the weights, whose mean is known to be 1, are the
    control variate. 0 takes the place of the variate's factor where all weights are equal.

    Args:
        weights, losses: as in `importance_weighted_risk`.
    """
    weighted = weights * losses
    variance = weights.var() if len(weights) > 1 else weights.new_zeros(())
    if variance <= 0:
        return float(weighted.mean())
    centred = weights - weights.mean()
    factor = -(centred * (weighted - weighted.mean())).sum() / (len(weights) - 1) / variance
    return float(weighted.mean() + factor * weights.mean() - factor)
