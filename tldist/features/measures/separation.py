"""Proxy A-distance: how well a linear classifier tells two domains apart."""

from __future__ import annotations

import torch

from tldist.features.arrays import Values, as_features, check_widths, choose_rows
from tldist.features.heads import fit_logistic

L2 = 1e-2
"""Strength of the classifier's penalty on features of unit mean variance."""


def proxy_a_distance(
    source: Values, target: Values, *, folds: int = 5, l2: float = L2, seed: int = 0, most: int = 2000
) -> float:
    """``2 (1 - 2 err)`` of a linear classifier that tells source from target, by cross-validation.

    Ben-David et al. (NeurIPS 2006, "Analysis of Representations for Domain Adaptation"). About 0 where the
    domains cannot be told apart (a little below by chance), 2 where they always can. Of both domains the
    same number of rows is used, as there.

    Args:
        source, target: (N, D) and (M, D), at least ``folds`` rows each.
        folds: parts, each held out once.
        l2: strength of the classifier's penalty (`tldist.features.heads.fit_logistic`).
        seed: of the choice of rows and of the parts.
        most: rows of each domain that are used.

    Raises:
        DomainError: too few rows, or other widths.
    """
    first = as_features(source, "the source's features", at_least=folds)
    second = as_features(target, "the target's features", at_least=folds)
    check_widths(first.shape[1], second.shape[1])
    count = min(len(first), len(second), most)
    features = torch.cat([a[choose_rows(len(a), count, seed)] for a in (first, second)]).cpu()
    labels = torch.arange(2).repeat_interleave(count)
    parts = (torch.randperm(count, generator=torch.Generator().manual_seed(seed)) % folds).repeat(2)
    wrong = 0
    for part in range(folds):
        seen, held_out = parts != part, parts == part
        head = fit_logistic(features[seen], labels[seen], 2, l2=l2)
        wrong += int((head.logits(features[held_out]).argmax(1) != labels[held_out]).sum())
    return 2 * (1 - 2 * wrong / len(labels))
