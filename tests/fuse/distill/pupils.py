"""Small teachers that know something, and images to teach with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tests.support import class_image, encode
from tests.support_models import SMALL
from tldist.bundle import BundleConfig
from tldist.domain import Domain, open_domain
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.zoo import build_network, describe_network
from tldist.runtime.preprocess import Preprocessing, prepare


def unlabelled(folder: Path, classes: Sequence[str], count: int, seed: int = 0) -> Path:
    """Images of all classes in one folder of files without class folders; as `make_images` draws them."""
    folder.mkdir(parents=True)
    for name in classes:
        random = np.random.default_rng([seed, *name.encode()])
        for number in range(count):
            picture = class_image(sum(name.encode()) % 4, random)
            (folder / f"{number}-{name}.png").write_bytes(encode(picture))
    return folder


def pixels(domain: Domain, how: Preprocessing) -> torch.Tensor:
    """All images as a model's input."""
    images = np.stack([prepare(domain.read(index), how) for index in range(len(domain))])
    return input_tensor(torch.from_numpy(images), how)


def train_teacher(
    path: Path,
    data: Path,
    classes: tuple[str, ...],
    *,
    name: str = "tests.nets:plain_cnn",
    how: Preprocessing = SMALL,
    steps: int = 60,
) -> Path:
    """A bundle trained on the images of ``classes`` alone, by a plain loop; its outputs in that order."""
    whole = open_domain(data)
    own = whole.subset([i for i in range(len(whole)) if whole.classes[whole.labels[i]] in classes])
    torch.manual_seed(len(classes))
    description = describe_network(name, len(classes))
    model = build_network(description, trust_code=True).train()
    inputs, labels = pixels(own, how), torch.from_numpy(own.labels_in(classes))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_bundle(path, model.eval(), BundleConfig(description, classes, how))
    return path


def accuracy(bundle: Path, data: Path) -> float:
    """Share of right answers by class name, a class that the model does not know being wrong."""
    model, config = load_bundle(bundle, trust_code=True)
    domain = open_domain(data)
    with torch.no_grad():
        answers = model(pixels(domain, config.preprocessing)).argmax(1).tolist()
    truth = [domain.classes[label] for label in domain.labels]
    return float(np.mean([config.classes[answer] == name for answer, name in zip(answers, truth)]))
