"""Collapsed classifiers are found, and sound ones are not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.support import make_images
from tests.support_models import SMALL
from tests.support_processes import run_ranks
from tldist import distributed
from tldist.bundle import Task
from tldist.data.loader import load_batches
from tldist.domain import open_domain
from tldist.features.extract import extract
from tldist.fuse.statistics.collapse import Look, check_features, count_answers, largest_share, look_at
from tldist.fuse.statistics.walk import Walk
from tldist.models.load import input_tensor
from tldist.training.ledger import Ledger


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"a": 14, "b": 13, "c": 13})


def net(folder: Path, seed: int = 0) -> nn.Module:
    """Gives different answers to the images of a folder."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 8, stride=8), nn.Tanh(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    ).eval()
    domain = open_domain(folder)
    pixels = next(load_batches(domain, [np.arange(len(domain))], SMALL)).images
    with torch.no_grad():
        model[-1].bias -= model(input_tensor(pixels, SMALL)).mean(0)
    return model


def look(model: nn.Module, folder: Path, task: Task = "multiclass", batch_size: int = 7) -> Look:
    domain = open_domain(folder)
    walk, ledger = Walk(batch_size=batch_size), Ledger(domain, None)
    return look_at(model, SMALL, domain, distributed.start(), ledger, walk=walk, task=task)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_look__equals_extracted_features_and_answers(images: Path, batch_size: int) -> None:
    model, domain = net(images), open_domain(images)
    features = extract(model, SMALL, domain, distributed.start()).features.double().numpy()
    answers = Counter(model[-1](torch.from_numpy(features).float()).argmax(1).tolist())
    found = look(model, images, batch_size=batch_size)
    assert found.count == 40
    assert found.share == max(answers.values()) / 40 < 0.9
    np.testing.assert_allclose(found.spread, features.var(0).sum(), rtol=1e-5)


def test_check__sound_models_pass(images: Path) -> None:
    looks = [look(net(images, seed), images) for seed in range(3)]
    assert check_features(looks[0], looks[1:]) is None
    assert check_features(looks[0], []) is None


def test_check__one_answer_for_all(images: Path) -> None:
    merged, parent = net(images), look(net(images, 1), images)
    with torch.no_grad():
        merged[-1].bias[1] += 50
    found = look(merged, images)
    assert "one answer" in str(check_features(found, [parent]))
    assert check_features(found, [parent, found]) is None  # a parent does so too: the images are like that


def test_check__features_that_no_longer_differ(images: Path) -> None:
    merged, parent = net(images), look(net(images, 1), images)
    with torch.no_grad():
        merged[0].weight *= 1e-4
        merged[-1].weight *= 1e4  # answers still differ
    domain = open_domain(images)
    pixels = next(load_batches(domain, [np.arange(len(domain))], SMALL)).images
    with torch.no_grad():
        merged[-1].bias -= merged(input_tensor(pixels, SMALL)).mean(0)
    found = look(merged, images)
    assert found.share < 1
    assert "hardly differ" in str(check_features(found, [parent]))
    assert check_features(found, [parent], vanished=1e-12) is None


def test_check__one_image_says_nothing() -> None:
    assert check_features(Look(1, 1.0, 0.0), [Look(1, 1.0, 0.0)]) is None


def test_answers__of_several_classes_are_sets() -> None:
    logits = torch.tensor([[1.0, 2.0, -1.0], [2.0, 1.0, -1.0], [1.0, -2.0, -1.0], [0.5, 3.0, -4.0]])
    assert sorted(count_answers(logits, "multilabel").values()) == [1, 3]
    assert sorted(count_answers(logits, "multiclass").values()) == [2, 2]
    assert largest_share(count_answers(logits, "multilabel")) == 0.75
    assert largest_share(Counter()) == 1.0


def _found(folder: Path, batch_size: int) -> Look:
    return look(net(folder), folder, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [6, 64])  # 64: an idle process
def test_look__processes_do_not_matter(images: Path, batch_size: int) -> None:
    alone = run_ranks(_found, 1, images, batch_size)[0]
    for found in run_ranks(_found, 2, images, batch_size):
        assert (found.count, found.share) == (alone.count, alone.share)
        np.testing.assert_allclose(found.spread, alone.spread, rtol=1e-12)
