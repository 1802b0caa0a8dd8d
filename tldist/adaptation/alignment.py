"""Losses that bring the features of two domains together: Deep CORAL, and DAN's kernels.

Shapes: N source and M target images of a step, over all processes; D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Variances of DAN's Gaussian kernels, in multiples of the mean squared distance."""


def deep_coral(source: Tensor, target: Tensor) -> Tensor:
    """``||C_S - C_T||_F^2 / (4 D^2)`` of the covariances (Deep CORAL, arXiv:1607.01719, eq. 1-3).

    Args:
        source: (N, D).
        target: (M, D).

    Returns:
        (); 0 where a domain has fewer than two images, which have no covariance.
    """
    if min(len(source), len(target)) < 2:
        return _nothing(source, target)
    difference = _covariance(source) - _covariance(target)
    return difference.square().sum() / (4 * source.shape[1] ** 2)


def multi_kernel_mmd(source: Tensor, target: Tensor, widths: Sequence[float] = WIDTHS) -> Tensor:
    """Squared maximum mean discrepancy under a sum of Gaussian kernels (DAN, arXiv:1502.02791, eq. 1-3), by
    the unbiased quadratic estimate (Gretton et al., JMLR 13, 2012, eq. 3).

    Each kernel is ``exp(-|x - y|^2 / (2 w s))``, where s is the mean squared distance in the batch and does
    not learn. All kernels count alike: the paper weighs them by a quadratic program that its authors' later
    code leaves out.

    Args:
        source: (N, D).
        target: (M, D).
        widths: w of each kernel.

    Returns:
        (); it may be below 0. 0 where a domain has fewer than two images.
    """
    n, m = len(source), len(target)
    if min(n, m) < 2:
        return _nothing(source, target)
    both = torch.cat([source, target])
    squared = _squared_distances(both)
    scale = squared.detach().mean().clamp(min=torch.finfo(squared.dtype).tiny)
    kernel = torch.stack([torch.exp(-squared / (2 * width * scale)) for width in widths]).sum(0)
    kernel = kernel - torch.diag(kernel.diagonal())  # a sample against itself says nothing
    within = kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1))
    return within - 2 * kernel[:n, n:].mean()


def _covariance(features: Tensor) -> Tensor:
    centred = features - features.mean(0)
    return centred.T @ centred / (len(features) - 1)


def _squared_distances(features: Tensor) -> Tensor:
    """(N, N), of features moved to their mean first: less is lost where two large numbers are subtracted."""
    centred = features - features.detach().mean(0)
    squares = centred.square().sum(1)
    return (squares[:, None] + squares - 2 * centred @ centred.T).clamp(min=0)


def _nothing(*tensors: Tensor) -> Tensor:
    """0 that still belongs to the graph: all processes go backward alike."""
    return torch.stack([tensor.sum() * 0 for tensor in tensors]).sum()
