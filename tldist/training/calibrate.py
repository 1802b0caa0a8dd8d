"""Calibration: one temperature that makes a classifier's probabilities mean what they say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_calibration_error


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the cross-entropy of ``softmax(logits / T)``.

    Guo et al., arXiv:1706.04599, section 4.2; found by L-BFGS over log T in float64.

    Args:
        logits: (N, K).
        labels: int64 (N,).

    Returns:
        T in [0.05, 20]; 1 is no change, above it the model was too sure of itself.
    """
    scores = logits.double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(scores / log_t.exp(), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp().clamp(0.05, 20))


def calibration_error(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Expected calibration error with 15 bins of ``softmax(logits / T)``."""
    probabilities = (logits.double() / temperature).softmax(1)
    error: Tensor = multiclass_calibration_error(
        probabilities, labels, num_classes=logits.shape[1], n_bins=15
    )
    return float(error)
