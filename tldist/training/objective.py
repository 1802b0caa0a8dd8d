"""The loss of each sample, and what is mixed before it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

Objective = Callable[[Tensor, Tensor], Tensor]
"""Logits (N, K) float32 and labels (N,), or a number a class (N, K), to the loss of each sample (N,)."""


def cross_entropy(label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> Objective:
    """Cross-entropy of each sample, times the weight of its class.

    Args:
        label_smoothing: share of the target that is spread over all classes (arXiv:1512.00567).
        class_weights: float32 (K,), on the device; None: all 1.
    """

    def objective(logits: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(
            logits, labels, reduction="none", label_smoothing=label_smoothing
        )
        if class_weights is None:
            return losses
        return losses * (class_weights[labels] if labels.dim() == 1 else labels @ class_weights)

    return objective


def binary_cross_entropy(label_smoothing: float = 0.0) -> Objective:
    """Of several classes an image: the mean over the classes of each one's binary cross-entropy.

    Args:
        label_smoothing: share of each target that is moved to one half.
    """

    def objective(logits: Tensor, targets: Tensor) -> Tensor:
        smooth = targets * (1 - label_smoothing) + label_smoothing / 2
        return nn.functional.binary_cross_entropy_with_logits(logits, smooth, reduction="none").mean(1)

    return objective


def balanced_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Weights by inverse class frequency: float32 (K,), with mean 1 over the samples; 0 for empty classes."""
    counts = np.bincount(labels, minlength=num_classes)
    weights = np.where(counts > 0, len(labels) / np.maximum(counts, 1), 0.0) / (counts > 0).sum()
    return torch.from_numpy(weights.astype(np.float32))


def build_mix(
    mixup: float, cutmix: float, num_classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """mixup (arXiv:1710.09412), cutmix (arXiv:1905.04899), or one of both at random, by torchvision."""
    choices: list[nn.Module] = []
    if mixup > 0:
        choices.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
    if cutmix > 0:
        choices.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
    chooser = choices[0] if len(choices) == 1 else v2.RandomChoice(choices)

    def mix(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mixed: tuple[Tensor, Tensor] = chooser(images, labels)
        return mixed

    return mix
