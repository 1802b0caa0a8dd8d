"""A model cut where its frozen part ends computes what the whole computes."""

from __future__ import annotations

import pytest
import torch

from tests.models.test_zoo import FAMILIES
from tldist.models.blocks import cut_blocks, freeze, trainable_blocks, training_mode
from tldist.models.split import CannotSplit, split_model
from tldist.models.zoo import build_network, describe_network

SIZES = {"inception_v3": 96, "maxvit_t": 224, "alexnet": 96, "squeezenet1_1": 96}


@pytest.mark.parametrize("train", ["head", "last:2"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("maxvit_t", "wide_resnet50_2")])
def test_split__prefix_then_suffix_is_the_model(name: str, train: str) -> None:
    torch.manual_seed(0)
    options = {"image_size": 64} if name.startswith("vit") else {}
    model = build_network(describe_network(name, 3, options), trust_code=False)
    blocks = cut_blocks(model)
    learning = trainable_blocks(model, blocks, train)
    training_mode(model, freeze(model, learning))
    model.eval()
    images = torch.randn(2, 3, SIZES.get(name, 64), SIZES.get(name, 64))
    prefix, suffix = split_model(model, blocks, learning)
    with torch.no_grad():
        assert torch.equal(suffix(prefix(images)), model(images))
    learned = {id(p) for p in model.parameters() if p.requires_grad}
    assert learned == {id(p) for p in suffix.parameters()}, "the suffix holds what learns and nothing else"
    assert not any(p.requires_grad for p in prefix.parameters())


def test_split__what_cannot_be_split_says_why() -> None:
    model = build_network(describe_network("resnet18", 3), trust_code=False)
    blocks = cut_blocks(model)
    with pytest.raises(CannotSplit, match="nothing is frozen"):
        split_model(model, blocks, blocks)
    with pytest.raises(CannotSplit, match="reads the images themselves"):
        split_model(model, blocks, blocks[:1])
