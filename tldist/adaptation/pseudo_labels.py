"""Labels that a model gives to a domain by its own class centres (SHOT).

Shapes: M target images, D features, K classes.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pseudo_labels(features: Tensor, probabilities: Tensor) -> Tensor:
    """The nearest class centre of each image by cosine distance (SHOT, arXiv:2002.08546, eq. 5-6): centres
    from the answers first, then once more from the labels that those give.

    As in the authors' code, a feature of constant 1 stands beside the others, and classes that no image is
    taken for have no centre.

    Args:
        features: (M, D).
        probabilities: (M, K).

    Returns:
        int64 (M,).
    """
    rows = torch.cat([features.double(), features.new_ones(len(features), 1).double()], 1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    labels = _nearest(rows, probabilities.double())
    return _nearest(rows, torch.nn.functional.one_hot(labels, probabilities.shape[1]).double())


def _nearest(rows: Tensor, shares: Tensor) -> Tensor:
    """For each row the class whose weighted mean row it has the smallest angle to."""
    answered = torch.bincount(shares.argmax(1), minlength=shares.shape[1]) > 0
    centres = shares.T @ rows / (1e-8 + shares.sum(0)[:, None])
    cosines = rows @ torch.nn.functional.normalize(centres, dim=1).T
    return cosines.masked_fill(~answered, -torch.inf).argmax(1)
