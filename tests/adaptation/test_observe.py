"""What a model says of a domain: in its order, without its broken images, for any number of processes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.nets import plain_cnn
from tests.support import make_images
from tests.support_processes import run_ranks
from tldist.adaptation.observe import observe, observe_mixtures
from tldist.distributed import start
from tldist.domain import DataRecipe, open_domain
from tldist.features.scorers.mixing import SHARE, partners
from tldist.models.load import input_tensor
from tldist.runtime.preprocess import Preprocessing, prepare

HOW = Preprocessing(height=32, width=32, resize=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More images than two processes take at once, one of them broken."""
    path = make_images(tmp_path_factory.mktemp("d") / "d", {"a": 70, "b": 72, "c": 60}, size=(12, 12))
    (path / "b" / "5.png").write_bytes(b"not an image")
    return path


def look(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray]]:
    torch.manual_seed(0)
    model, team = plain_cnn(3), start()
    domain = open_domain(DataRecipe.make(path=str(folder), max_bad=0.1))
    seen = observe(model, HOW, domain, team, classes=("c", "b", "a"))
    whole = domain.subset(seen.indices)
    mixed = observe_mixtures(model, HOW, whole, team, seed=3)
    return [seen.features, seen.logits, seen.labels, seen.indices], [tensor.numpy() for tensor in mixed]


def test_observe__one_process_two_and_image_by_image_agree(folder: Path) -> None:
    domain = open_domain(folder)
    broken = [domain.id(i) for i in range(len(domain))].index("b/5.png")
    kept = [i for i in range(len(domain)) if i != broken]
    torch.manual_seed(0)
    model = plain_cnn(3)
    pictures = np.stack([prepare(domain.read(i), HOW) for i in kept])
    with torch.no_grad():
        inputs = input_tensor(torch.from_numpy(pictures), HOW)
        features = model[:-1](inputs)
        logits = model[-1](features)
        partner = partners(len(kept), 3)
        mixed = model(SHARE * inputs + (1 - SHARE) * inputs[partner]).argmax(1)
    for seen, mixtures in (*run_ranks(look, 1, folder), *run_ranks(look, 2, folder)):
        np.testing.assert_allclose(seen[0], features, atol=1e-5)
        np.testing.assert_allclose(seen[1], logits, atol=1e-5)
        assert seen[2].tolist() == [2 - domain.labels[i] for i in kept]
        assert seen[3].tolist() == kept
        assert mixtures[0].tolist() == partner.tolist()
        assert (mixtures[1] == mixed.numpy()).mean() > 0.99
