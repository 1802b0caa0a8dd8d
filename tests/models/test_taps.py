"""Taps: any inner layer, its channels told from its positions, pooled to one vector an image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import ConvNeXt, SwinTransformer, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.feature_extraction import create_feature_extractor

from tests.support_models import SMALL, lively_model
from tldist.bundle import BundleConfig
from tldist.errors import ModelError
from tldist.fuse.outputs import build_ensemble
from tldist.models.heads import tapped
from tldist.models.taps import POOLS, Tap, find_taps, pool_features, tapped_layers, unit_length
from tldist.models.zoo import describe_network


def images(size: int = 32, count: int = 3) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def features(model: nn.Module, layers: list[str], x: Tensor, pool: str = "mean") -> dict[str, Tensor]:
    taps = find_taps(model, layers, x)
    with torch.no_grad(), tapped_layers(model, taps, pool) as found:
        model(x)
        return found()


def small_swin(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return SwinTransformer([4, 4], width, [1, 1], [2, 2], [2, 2], num_classes=4).eval()


def small_convnext(width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    stages = [CNBlockConfig(width, 2 * width, 1), CNBlockConfig(2 * width, None, 1)]
    return ConvNeXt(stages, layer_scale=1.0, num_classes=4).eval()


def small_vit() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4).eval()


@pytest.mark.parametrize("shape", [(3, 5, 4, 6), (2, 1, 1, 1), (4, 7, 9)])
@pytest.mark.parametrize("axis", [1, -1])
def test_pool__closed_forms(shape: tuple[int, ...], axis: int) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 0.5
    wide = np.moveaxis(values.double().numpy(), axis, -1).reshape(shape[0], -1, shape[axis])
    expected = {
        "mean": wide.mean(1),
        "max": wide.max(1),
        "gem": (np.maximum(wide, 1e-6) ** 3).mean(1) ** (1 / 3),
        "flatten": values.double().numpy().reshape(shape[0], -1),
    }
    for pool, numbers in expected.items():
        np.testing.assert_allclose(pool_features(values, axis, pool).numpy(), numbers, rtol=1e-5, atol=1e-6)


def test_pool__token_and_vectors() -> None:
    tokens = torch.randn(2, 5, 3)
    assert torch.equal(pool_features(tokens, -1, "token"), tokens[:, 0])
    vectors = torch.randn(2, 3)
    assert all(torch.equal(pool_features(vectors, 1, pool), vectors) for pool in POOLS)
    for values, axis in ((torch.randn(2, 3, 4, 4), 1), (torch.randn(2, 3, 4), 1)):
        with pytest.raises(ModelError, match="pool=token"):
            pool_features(values, axis, "token")
    with pytest.raises(ModelError, match=r"'gen'.*gem"):
        pool_features(vectors, 1, "gen")


def test_unit_length__zeros_stay() -> None:
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    torch.testing.assert_close(unit_length(features), torch.tensor([[0.6, 0.8], [0, 0], [0, -1]]))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_taps__convolutional_networks_against_torchvision(name: str) -> None:
    model = lively_model(name, 3)
    layers = {
        "resnet18": ["layer1", "layer2.0.conv1", "layer3.1", "avgpool"],
        "mobilenet_v3_small": ["features.1", "features.4.block.2", "features.12"],
        "densenet121": ["features.denseblock1", "features.transition2", "features.norm5"],
    }[name]
    reference = create_feature_extractor(model, layers)
    with torch.no_grad():
        expected = reference(images())
    for layer, found in features(model, layers, images()).items():
        torch.testing.assert_close(found, expected[layer].mean((2, 3)))


def test_taps__before_the_next_layer_overwrites_it() -> None:
    """resnet18's bn1 is followed by a ReLU in place."""
    model = lively_model("resnet18", 3)
    with torch.no_grad():
        plain = model.bn1(model.conv1(images()))
    for pool in ("max", "flatten"):
        found = features(model, ["bn1"], images(), pool)["bn1"]
        torch.testing.assert_close(found, pool_features(plain, 1, pool))
    assert (features(model, ["bn1"], images(), "flatten")["bn1"] < 0).any()


@pytest.mark.parametrize("size", [24, 32, 48])  # at 32 the first stage is (N, 8, 8, 8)
def test_taps__swin_has_its_channels_last(size: int) -> None:
    model = small_swin()
    layers = ["features.0", "features.1", "features.1.0.mlp", "features.2", "norm", "permute"]
    taps = find_taps(model, layers, images(size))
    assert [tap.axis for tap in taps] == [-1, -1, -1, -1, -1, 1]
    assert find_taps(model, ["features.0.0", "flatten"], images(24)) == (
        Tap("features.0.0", 1),
        Tap("flatten", -1),
    )
    with torch.no_grad():
        stage = model.features[:2](images(size))
    assert stage.shape[3] == 8
    found = features(model, ["features.1"], images(size))["features.1"]
    torch.testing.assert_close(found, stage.mean((1, 2)))


@pytest.mark.parametrize("size", [32, 48])  # at 32 the first stage is (N, 8, 8, 8)
def test_taps__convnext_has_them_second_outside_its_blocks(size: int) -> None:
    model = small_convnext()
    layers = ["features.0", "features.1", "features.1.0.block.6", "features.2", "features.3"]
    assert [tap.axis for tap in find_taps(model, layers, images(size))] == [1] * 5
    assert find_taps(model, ["features.1.0.block.3"], images(48))[0].axis == -1


def test_taps__axis_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(ModelError, match=r"features.1.0.block.2.*\(3, 8, 8, 8\).*cannot be told"):
        find_taps(small_convnext(), ["features.1.0.block.2"], images(32))


def test_taps__transformer_tokens() -> None:
    model = small_vit()
    layers = ["encoder", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1.self_attention"]
    assert [tap.axis for tap in find_taps(model, layers, images())] == [-1, -1, -1]
    with torch.no_grad(), tapped(model) as head_reads:
        model(images())
    torch.testing.assert_close(features(model, ["encoder"], images(), "token")["encoder"], head_reads())


def test_taps__layers_of_an_ensembles_members() -> None:
    members = [(lively_model("tests.nets:plain_cnn", 3, seed), _config()) for seed in (0, 1)]
    ensemble = build_ensemble(members)[0].eval()
    names = ["members.0.model.2", "members.1.model.2"]
    found = features(ensemble, names, images())
    for (member, _), name in zip(members, names):
        torch.testing.assert_close(found[name], features(member, ["2"], images())["2"])


def _config() -> BundleConfig:
    return BundleConfig(describe_network("tests.nets:plain_cnn", 3), ("a", "b", "c"), SMALL)


class Odd(nn.Module):
    """Layers whose outputs are no features of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.unused = nn.Conv2d(3, 4, 3)
        self.windows = nn.Unflatten(0, (-1, 1))
        self.table = _Call(lambda x: {"x": x})
        self.volume = _Call(lambda x: x[:, :, None])
        self.split = _Call(lambda x: x.reshape(-1, 2, *x.shape[2:]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.table(x), self.volume(x), self.split(x)
        return x.mean((2, 3))


class _Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        (["cnov"], r"'cnov'.*conv.*tldist layers"),
        ([""], "none of this name"),
        (["conv", "conv"], "twice"),
        (["unused"], "does not run"),
        (["table"], "gives dict"),
        (["volume"], r"gives \(3, 4, 1, 30, 30\)"),
        (["split"], r"gives \(6, 2, 30, 30\) for 3 images"),
    ],
)
def test_taps__what_has_no_features_is_named(layers: list[str], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        find_taps(Odd(), layers, images())


def test_taps__leave_no_hook_behind() -> None:
    model = small_swin()
    features(model, ["features.1", "norm"], images())
    with pytest.raises(ModelError):
        find_taps(model, ["nothing"], images())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "layers", "axes"),
    [
        ("convnext_tiny", ["stages.0", "stages.3.blocks.1", "stages.0.blocks.0.mlp"], [1, 1, -1]),
        ("swin_tiny_patch4_window7_224", ["patch_embed", "layers.1", "norm"], [-1, -1, -1]),
        ("vit_tiny_patch16_224", ["blocks.3", "norm"], [-1, -1]),
    ],
)
def test_taps__timm(name: str, layers: list[str], axes: list[int]) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, num_classes=3).eval()
    size = 64 if name == "convnext_tiny" else 224
    assert [tap.axis for tap in find_taps(model, layers, images(size, 2))] == axes


def test_heads__reduce_sees_the_head() -> None:
    model = lively_model("squeezenet1_1", 3)
    seen = []

    def reduce(values: Tensor, head: nn.Module) -> Tensor:
        seen.append((values.shape, type(head)))
        return values.amax((2, 3))

    with torch.no_grad(), tapped(model, reduce) as largest:
        model(images(64))
        assert largest().shape == (3, 512)
    assert seen == [((3, 512, 3, 3), nn.Conv2d)]
