"""Small bundles for tests: random weights whose outputs are not degenerate."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tldist.bundle import BundleConfig
from tldist.models.load import save_bundle
from tldist.models.zoo import build_network, describe_network
from tldist.runtime.preprocess import Preprocessing

SMALL = Preprocessing(height=32, width=32, resize=32)


def lively_model(name: str, num_classes: int, seed: int = 0) -> nn.Module:
    """A network with random weights and BatchNorm statistics that fit them, in evaluation mode."""
    torch.manual_seed(seed)
    model = build_network(describe_network(name, num_classes), trust_code=True)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def make_bundle(
    path: Path, classes: tuple[str, ...], name: str = "resnet18", seed: int = 0, how: Preprocessing = SMALL
) -> Path:
    """Write a bundle with random weights; returns its folder."""
    model = lively_model(name, len(classes), seed)
    save_bundle(path, model, BundleConfig(describe_network(name, len(classes)), classes, how))
    return path


def log_softmax_net(num_classes: int) -> nn.Module:
    """A person's own network, which computes something after its head."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, num_classes),
        nn.LogSoftmax(1),
    )
