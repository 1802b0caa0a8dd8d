"""Calibration: one temperature that makes a classifier's probabilities mean what they say."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_calibration_error, multiclass_calibration_error

from tldist.training.measure import Measurement


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that minimises the cross-entropy of ``softmax(logits / T)``, or of ``sigmoid`` of it.

    Guo et al., arXiv:1706.04599, section 4.2; found by L-BFGS over log T in float64.

    Args:
        logits: (N, K).
        labels: int64 (N,); or float (N, K), 0 or 1 for each class.

    Returns:
        T in [0.05, 20]; 1 is no change, above it the model was too sure of itself.
    """
    scores = logits.double()
    log_t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        scaled = scores / log_t.exp()
        loss = (
            nn.functional.binary_cross_entropy_with_logits(scaled, labels.double())
            if labels.dim() == 2
            else nn.functional.cross_entropy(scaled, labels)
        )
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_t.detach().exp().clamp(0.05, 20))


def calibration_error(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Expected calibration error with 15 bins of ``softmax(logits / T)``, or of each class's ``sigmoid``."""
    scaled = logits.double() / temperature
    if labels.dim() == 2:
        alone: Tensor = binary_calibration_error(
            scaled.sigmoid().flatten(), labels.long().flatten(), n_bins=15
        )
        return float(alone)
    probabilities = scaled.softmax(1)
    error: Tensor = multiclass_calibration_error(
        probabilities, labels, num_classes=logits.shape[1], n_bins=15
    )
    return float(error)


def calibrate(found: Measurement) -> dict[str, float]:
    """The temperature fitted on a measurement that kept its logits, and the expected calibration error
    without it and with it."""
    assert found.logits is not None
    assert found.labels is not None
    temperature = fit_temperature(found.logits, found.labels)
    return {
        "temperature": temperature,
        "error_before": calibration_error(found.logits, found.labels, 1.0),
        "error_after": calibration_error(found.logits, found.labels, temperature),
    }
