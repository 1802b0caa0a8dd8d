"""The losses of adaptation written another way, from their papers; autograd gives their gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def deep_coral(source: Tensor, target: Tensor) -> Tensor:
    """Eq. 1 of arXiv:1607.01719, with the covariances of `torch.cov`."""
    distance = torch.linalg.matrix_norm(torch.cov(source.T) - torch.cov(target.T), "fro") ** 2
    return distance / (4 * source.shape[1] ** 2)


def dan(source: Tensor, target: Tensor, widths: tuple[float, ...]) -> Tensor:
    """Pair by pair: eq. 3 of Gretton et al. 2012, with differences in the place of products."""
    both = torch.cat([source, target])
    scale = ((both[:, None] - both[None]) ** 2).sum(2).detach().mean()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        distance = ((x - y) ** 2).sum()
        return sum((torch.exp(-distance / (2 * width * scale)) for width in widths), torch.zeros(()).double())

    n, m = len(source), len(target)
    within_s = sum(kernel(source[i], source[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_t = sum(kernel(target[i], target[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    between = sum(kernel(x, y) for x in source for y in target) / (n * m)
    return within_s + within_t - 2 * between


def mcc(logits: Tensor, temperature: float) -> Tensor:
    """Eq. 2-7 of arXiv:1912.03699, entry by entry."""
    rows, classes = logits.shape
    p = torch.exp(logits / temperature) / torch.exp(logits / temperature).sum(1, keepdim=True)
    entropies = torch.stack([-(row * row.log()).sum() for row in p]).detach()
    weights = rows * (1 + torch.exp(-entropies)) / (1 + torch.exp(-entropies)).sum()
    table = [
        [sum(weights[i] * p[i, j] * p[i, k] for i in range(rows)) for k in range(classes)]
        for j in range(classes)
    ]
    off = [table[j][k] / sum(table[j]) for j in range(classes) for k in range(classes) if j != k]
    return torch.stack(off).sum() / classes


def bnm(logits: Tensor) -> Tensor:
    """Eq. 10 of arXiv:2003.12237: the nuclear norm as the trace of the root of P^T P."""
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    return -torch.linalg.eigvalsh(p.T @ p).clamp(min=1e-300).sqrt().sum() / len(p)


def information(logits: Tensor) -> Tensor:
    """Minus the mutual information, as the mean divergence of each answer from the mean answer."""
    p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
    return -(p * (p / p.mean(0)).log()).sum(1).mean()


def domain_loss(source: Tensor, target: Tensor, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Binary cross-entropy of the probability of being of the source, the mean of both domains."""
    first, second = -torch.log(torch.sigmoid(source)), -torch.log(1 - torch.sigmoid(target))
    if weights is not None:
        first, second = first * weights[0], second * weights[1]
    return (first.mean() + second.mean()) / 2


def certainty_weights(logits: Tensor) -> Tensor:
    """1 + exp(-H) with mean 1 (section 3.3 of arXiv:1705.10667)."""
    p = torch.softmax(logits, 1).detach()
    weights = 1 + torch.exp(-torch.distributions.Categorical(p).entropy())
    return weights / weights.mean()
