"""Networks in float64 whose every parameter and buffer matters, and random permutations of their units."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.models import VisionTransformer

from tldist.fuse.rebasin.spec import Permutations, Spec
from tldist.models.chain import Affine, Chain, Scale
from tldist.models.zoo import build_network, describe_network

CLASSES = 5


def build(name: str) -> nn.Module:
    """A network of the zoo by name, a small ViT, or a backbone with transforms of its features."""
    if name == "small_vit":
        return VisionTransformer(32, 8, 3, 4, hidden_dim=24, mlp_dim=40, num_classes=CLASSES)
    if name == "chain":
        backbone = build_network(describe_network("resnet18", CLASSES), trust_code=False)
        return Chain(backbone, [_filled(Affine(512, 8)), _filled(Scale(8))], nn.Linear(8, CLASSES))
    return build_network(describe_network(name, CLASSES), trust_code=False)


def _filled(transform: nn.Module) -> nn.Module:
    for buffer in transform.buffers():
        nn.init.normal_(buffer)
    return transform


def restless(model: nn.Module, seed: int = 0, size: int = 32) -> nn.Module:
    """The network in float64 and evaluation mode, with no parameter and no statistic at a neutral value.

    A scale of 1, a bias of 0 or a layer scale of 1e-6 would hide that it was not permuted.
    """
    torch.manual_seed(seed)
    model = model.double()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 1 or name in ("layer_scale", "pos_embedding", "class_token"):
                low, high = (0.5, 1.5) if name == "weight" else (-0.5, 0.5)
                nn.init.uniform_(parameter, low, high)
            elif not parameter.any():
                nn.init.normal_(parameter, std=0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size, dtype=torch.float64))
    return model.eval()


def shuffled(spec: Spec, seed: int) -> Permutations:
    """Random permutations in every group."""
    random = np.random.default_rng(seed)
    return {group.name: random.permutation(group.size) for group in spec.groups}


@torch.no_grad()
def answers(model: nn.Module, tensors: dict[str, Tensor], size: int = 32) -> Tensor:
    """What a network computes with these tensors from two noisy images."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=generator)
    found: Tensor = functional_call(model, tensors, (images,), tie_weights=False)
    return found


def difference(first: Tensor, second: Tensor) -> float:
    """The relative error between two outputs."""
    return float((first - second).norm() / first.norm())
