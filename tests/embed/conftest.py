"""Small models to embed with: a bundle, and a package whose features can be computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.embed.tiny import SIZE, tiny_package
from tests.support import make_images
from tldist.models.load import save_bundle, start_model

WIDTH = 8


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 with random weights and running statistics, for the classes 1, 2 and 10."""
    path = tmp_path_factory.mktemp("embed") / "bundle"
    torch.manual_seed(0)
    start = start_model("resnet18", "none", ("1", "2", "10"), image_size=SIZE)
    for module in start.model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    save_bundle(path, start.model, start.config)
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """57 images in the class folders 1, 2 and 10."""
    return make_images(tmp_path_factory.mktemp("images"), {"10": 20, "2": 20, "1": 17})


@pytest.fixture(scope="session")
def projection() -> np.ndarray:
    """The weights of the package below: (3, D)."""
    return np.random.default_rng(5).normal(size=(3, WIDTH)).astype(np.float32)


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory, projection: np.ndarray) -> Path:
    """A package that gives features."""
    return tiny_package(tmp_path_factory.mktemp("embed") / "package", projection)


@pytest.fixture(scope="session")
def logits_package(tmp_path_factory: pytest.TempPathFactory, projection: np.ndarray) -> Path:
    """A package that gives no features."""
    return tiny_package(tmp_path_factory.mktemp("embed") / "package", projection, "logits")
