"""Small networks that tests name as ``tests.nets:function``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn


def plain_cnn(num_classes: int) -> nn.Module:
    """Two convolutions and a head: no BatchNorm, no dropout, smooth (no ReLU kinks that amplify rounding)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )


class _Recording(nn.Module):
    """Writes the ids of the images that it is trained on, which stand in their blue channel."""

    def forward(self, images: Tensor) -> Tensor:
        trace = os.environ.get("TLDIST_TEST_TRACE")
        if self.training and trace:
            time.sleep(float(os.environ.get("TLDIST_TEST_STEP_SECONDS", "0")))
            grey = (images[:, 2, 0, 0] * 0.225 + 0.406) * 255
            with Path(trace).open("a", encoding="utf-8") as file:
                file.write(" ".join(str(round(value)) for value in grey.tolist()) + "\n")
        return images


def recording_cnn(num_classes: int) -> nn.Module:
    """A network with live BatchNorm and dropout that records what it learns from."""
    return nn.Sequential(
        _Recording(),
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32, num_classes),
    )


def tracing_cnn(num_classes: int) -> nn.Module:
    """`plain_cnn`, recording what it learns from."""
    return nn.Sequential(_Recording(), *plain_cnn(num_classes))


def nan_cnn(num_classes: int) -> nn.Module:
    """A network whose head is not a number."""
    model = plain_cnn(num_classes)
    with torch.no_grad():
        model[-1].bias.fill_(float("nan"))
    return model


class _Branching(nn.Module):
    """Its way depends on the numbers, so that its forward cannot be traced."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = plain_cnn(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(images)
        return self.fc(features if features.sum() > 0 else -features)


def branching_cnn(num_classes: int) -> nn.Module:
    """A network with a branch that depends on its input."""
    return _Branching(num_classes)


class _Slow(nn.Module):
    """In evaluation, it tells that it was called and takes its time; its function is the identity."""

    def forward(self, images: Tensor) -> Tensor:
        marker = os.environ.get("TLDIST_TEST_MARKER")
        if not self.training and marker and len(images) > 1:
            Path(marker).touch()
            time.sleep(0.3)
        return images


def slow_cnn(num_classes: int) -> nn.Module:
    """`recording_cnn`, slow when it is measured."""
    return nn.Sequential(_Slow(), *recording_cnn(num_classes))


class _Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 4, 4)
        self.first, self.second = nn.Linear(24, 24, bias=False), nn.Linear(24, 24, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(24, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images).mean((2, 3))
        return self.head(self.second(self.first(features).relu()).relu())


def tied_cnn(num_classes: int) -> nn.Module:
    """A network with tied weights."""
    return _Tied(num_classes)
