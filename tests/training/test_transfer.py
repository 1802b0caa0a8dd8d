"""What a step takes from the target: whole images alone, with the weight of the moment."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tldist.adaptation.methods import METHODS, Method, Pair
from tldist.adaptation.network import Said
from tldist.adaptation.recipe import AdaptRecipe
from tldist.data.loader import Batch
from tldist.distributed import Team
from tldist.training.transfer import Transfer

TEAM = Team(0, 1, 1, torch.device("cpu"))


def batch(valid: list[bool], beside: Batch | None = None) -> Batch:
    count = len(valid)
    images = torch.arange(count)[:, None, None, None].expand(count, 2, 2, 3).to(torch.uint8)
    labels, indices = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    return Batch(images, labels, indices, torch.tensor(valid), [], None, beside)


def transfer(method: str = "mcc", **settings: object) -> Transfer:
    recipe = AdaptRecipe.make(method=method, target={"path": "x"}, **settings)
    return Transfer(METHODS[method], recipe, TEAM, 2.0, lambda samples: samples / 100)


def as_input(images: Tensor) -> Tensor:
    return images.float()


def test_others__broken_images_are_left_out() -> None:
    others = transfer().others(batch([True], batch([True, False, True])), 0, as_input)
    assert others.images is not None
    assert others.images[:, 0, 0, 0].tolist() == [0, 2]
    assert others.count == 2


def test_others__of_a_share_without_a_whole_image_none_counts() -> None:
    others = transfer().others(batch([True], batch([False, False])), 0, as_input)
    assert others.images is not None
    assert len(others.images) == 1, "it keeps this process in step"
    assert others.count == 0


def test_others__without_a_second_domain_the_images_are_the_targets() -> None:
    others = transfer("shot").others(batch([True, False, True]), 0, as_input)
    assert others.images is None
    assert others.count == 2


@pytest.mark.parametrize(
    ("method", "schedule", "rises"),
    [("mcc", "auto", False), ("dann", "auto", True), ("dann", "constant", False), ("mcc", "rise", True)],
)
def test_strength__is_constant_or_rises(method: str, schedule: str, rises: bool) -> None:
    found = [
        transfer(method, schedule=schedule).others(batch([True]), samples, as_input).strength
        for samples in (0, 50, 100)
    ]
    assert found == pytest.approx([2 * np.tanh(5 * done) if rises else 2 for done in (0, 0.5, 1)])


def test_loss__is_of_what_counts_alone() -> None:
    seen: list[Pair] = []

    def look(pair: Pair) -> Tensor:
        seen.append(pair)
        return pair.target.logits.sum() + pair.source.features.sum()

    own = Transfer(Method(look), AdaptRecipe.make(method="mcc", target={"path": "x"}), TEAM, 2.0, lambda s: s)
    source, target = (Said(torch.ones(n, 2), torch.ones(n, 3), torch.ones(n, 0)) for n in (4, 5))
    others = own.others(batch([True], batch([True, True, False])), 0, as_input)
    loss = own.loss((source, target), torch.tensor([3, 2, 1, 0]), 3, others)
    assert [len(seen[0].source.logits), len(seen[0].target.logits)] == [3, 2]
    assert seen[0].labels.tolist() == [3, 2, 1]
    assert float(loss) == 2 * (2 * 2 + 3 * 3)
