"""The general mechanism: head, blocks, feature width, for every kind of torchvision classifier."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from tldist.models.blocks import cut_blocks, freeze, trainable_blocks, training_mode
from tldist.models.chain import Affine, Chain, Scale
from tldist.models.heads import copy_rows_by_name, find_head, head_outputs, head_width, tapped
from tldist.models.split import split_model
from tldist.models.zoo import build_network, describe_network, list_architectures

FAMILIES = [
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t",
    "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "resnet18", "resnext50_32x4d", "shufflenet_v2_x0_5",
    "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_32", "wide_resnet50_2",
]  # fmt: skip


def without_memory(name: str) -> nn.Module:
    """A network whose weights have shapes and no numbers."""
    with init_empty_weights():
        return build_network(describe_network(name, 7), trust_code=False).to("meta")


@pytest.mark.parametrize("name", list_architectures())
def test_whole_zoo__every_parameter_belongs_to_one_block_and_the_head_is_last(name: str) -> None:
    model = without_memory(name)
    path, head = find_head(model)
    assert head_outputs(head) == 7
    assert head_width(head) >= 400
    blocks = cut_blocks(model)
    assert blocks[-1].name == path
    assert len(blocks) >= 5
    for parameter, _ in model.named_parameters():
        assert sum(block.owns(parameter) for block in blocks) == 1, parameter
    order = [next(n for n, _ in model.named_parameters() if block.owns(n)) for block in blocks]
    names = [n for n, _ in model.named_parameters()]
    assert [names.index(n) for n in order[1:]] == sorted(names.index(n) for n in order[1:])


@pytest.mark.parametrize("name", list_architectures())
def test_whole_zoo__is_cut_where_its_frozen_part_ends(name: str) -> None:
    model = without_memory(name).eval()
    blocks = cut_blocks(model)
    size = 299 if name == "inception_v3" else 224
    for what in ("head", "last:2"):
        learning = trainable_blocks(model, blocks, what)
        prefix, suffix = split_model(model, blocks, learning)
        assert suffix(prefix(torch.zeros(2, 3, size, size, device="meta"))).shape == (2, 7)
        learns = {n for n, _ in model.named_parameters() if any(block.owns(n) for block in learning)}
        names = {id(p): n for n, p in model.named_parameters()}
        assert {names[id(p)] for p in suffix.parameters()} == learns


def test_zoo__lists_what_torchvision_has() -> None:
    assert len(list_architectures()) >= 80
    assert "resnet50" in list_architectures()


def test_freeze__only_what_learns_has_gradients_and_trains() -> None:
    model = build_network(describe_network("resnet18", 3), trust_code=False)
    blocks = trainable_blocks(model, cut_blocks(model), "last:1")
    assert [block.name for block in blocks] == ["layer4", "fc"]
    frozen = freeze(model, blocks)
    training_mode(model, frozen)
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.training == name.startswith("layer4"), name
    with_gradient = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert with_gradient == {"layer4", "fc"}


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small"])
def test_tapped__features_are_what_the_head_reads(name: str) -> None:
    torch.manual_seed(0)
    model = build_network(describe_network(name, 5), trust_code=False).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad(), tapped(model) as features:
        logits = model(images)
        seen = features()
    head = find_head(model)[1]
    assert seen.shape == (3, head_width(head))
    if isinstance(head, nn.Linear):
        assert torch.allclose(head(seen), logits, atol=1e-6)
    else:
        assert torch.allclose(seen, model.features(images).mean((2, 3)), atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_chain__is_backbone_transforms_and_head(name: str) -> None:
    torch.manual_seed(0)
    backbone = build_network(describe_network(name, 5), trust_code=False).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), tapped(backbone) as features:
        backbone(images)
        seen = features().double()
    scale, affine, head = Scale(512), Affine(512, 16), nn.Linear(16, 4)
    for module in (scale, affine):
        module.weight.normal_()
        module.bias.normal_()
    chain = Chain(backbone, [scale, affine], head).eval()
    expected = seen * scale.weight.double() + scale.bias.double()
    expected = expected @ affine.weight.double().T + affine.bias.double()
    expected = expected @ head.weight.double().T + head.bias.double()
    with torch.no_grad():
        assert torch.allclose(chain(images).double(), expected, rtol=1e-4, atol=1e-3)
    assert find_head(chain)[0] == "head"


def test_copy_rows__by_name_for_linear_and_convolution() -> None:
    for old, new in ((nn.Linear(4, 3), nn.Linear(4, 2)), (nn.Conv2d(4, 3, 1), nn.Conv2d(4, 2, 1))):
        kept = new.weight[1].clone()
        assert copy_rows_by_name(new, old.weight, old.bias, ["a", "b", "c"], ["c", "z"]) == 1
        assert torch.equal(new.weight[0], old.weight[2])
        assert torch.equal(new.bias[0], old.bias[2])
        assert torch.equal(new.weight[1], kept)
