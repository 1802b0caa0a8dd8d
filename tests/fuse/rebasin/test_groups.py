"""Groups that are found from a network: permuting them changes nothing, and they are most of the network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.nets import branching_cnn
from tests.support_rebasin import answers, build, difference, restless, shuffled
from tldist.errors import ModelError
from tldist.fuse.rebasin.spec import Spec, inverse, num_moved, permute
from tldist.fuse.rebasin.trace import FAMILIES, find_groups

SIZES = {"alexnet": 64, "inception_v3": 75, "timm/vit_tiny_patch16_224": 224}

SHARES = {
    "alexnet": 0.99,
    "chain": 0.99,
    "convnext_tiny": 0.99,
    "densenet121": 0.99,
    "efficientnet_b0": 0.99,
    "googlenet": 0.99,
    "inception_v3": 0.99,
    "mnasnet0_5": 0.99,
    "mobilenet_v2": 0.99,
    "mobilenet_v3_small": 0.99,
    "regnet_y_400mf": 0.95,
    "resnet18": 0.99,
    "resnet50": 0.99,
    "resnext50_32x4d": 0.95,
    "shufflenet_v2_x0_5": 0.45,
    "small_vit": 0.85,
    "squeezenet1_1": 0.99,
    "swin_t": 0.3,
    "timm/mobilenetv3_small_050": 0.99,
    "timm/vit_tiny_patch16_224": 0.8,
    "vgg11_bn": 0.99,
}
"""How much of each network is in groups, at least."""


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def error_of(model: nn.Module, spec: Spec, seed: int = 0, size: int = 32) -> float:
    """How much a random permutation changes what the network computes."""
    tensors = state(model)
    moved = permute(tensors, spec, shuffled(spec, seed))
    return difference(answers(model, tensors, size), answers(model, moved, size))


@pytest.mark.parametrize("name", SHARES)
def test_permute__leaves_the_function_of_networks_unchanged(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    size = SIZES.get(name, 32)
    model = restless(build(name), size=size)
    spec = find_groups(model, (size, size))
    images = answers(model, state(model), size)
    assert float((images[0] - images[1]).norm() / images.norm()) > 1e-6, "the network does not look at images"
    assert spec.share >= SHARES[name]
    assert all(group.taps for group in spec.groups)
    assert error_of(model, spec, size=size) < 1e-10


def test_families__each_that_an_error_names_is_tested() -> None:
    tested = " ".join([*SHARES, "vit"])
    assert all(family in tested for family in FAMILIES)
    assert "swin" not in FAMILIES


@pytest.mark.parametrize("name", ["resnet18", "small_vit", "mobilenet_v3_small", "squeezenet1_1", "chain"])
def test_groups__no_place_is_too_many(name: str) -> None:
    """Without any one of its places, permuting a group does change the function."""
    model = restless(build(name))
    spec = find_groups(model, (32, 32))
    tensors = state(model)
    before = answers(model, tensors)
    random = np.random.default_rng(0)
    for group in random.choice(np.array(spec.groups, dtype=object), 6, replace=False):
        # A bias of keys adds the same to all scores of a query, so no attention depends on it.
        kept = [n for n, place in enumerate(group.places) if not place.tensor.endswith("in_proj_bias")]
        dropped = int(random.choice(kept))
        less = replace(group, places=tuple(np.delete(np.array(group.places, dtype=object), dropped)))
        wrong = permute(tensors, Spec((less,)), {group.name: np.roll(np.arange(group.size), 1)})
        assert difference(before, answers(model, wrong)) > 1e-6, group.places[dropped]


def test_groups__batchnorm_statistics_are_permuted_with_their_channels() -> None:
    model = restless(build("resnet18"))
    spec = find_groups(model, (32, 32))
    (group,) = [group for group in spec.groups if group.name == "layer1.0.conv1.weight:0"]
    places = {(place.tensor, place.axis): place.learned for place in group.places}
    assert places == {
        ("layer1.0.conv1.weight", 0): True,
        ("layer1.0.bn1.weight", 0): True,
        ("layer1.0.bn1.bias", 0): True,
        ("layer1.0.bn1.running_mean", 0): False,
        ("layer1.0.bn1.running_var", 0): False,
        ("layer1.0.conv2.weight", 1): True,
    }
    order = shuffled(spec, 0)
    mean = state(model)["layer1.0.bn1.running_mean"]
    moved = permute(state(model), spec, order)["layer1.0.bn1.running_mean"]
    assert torch.equal(moved, mean[torch.from_numpy(order[group.name])])
    assert not torch.equal(moved, mean)


def test_groups__a_residual_stream_is_one_group() -> None:
    spec = find_groups(build("resnet18"), (32, 32))
    (group,) = [group for group in spec.groups if group.name == "conv1.weight:0"]
    names = {place.tensor for place in group.places}
    assert {
        "bn1.running_var",
        "layer1.0.conv1.weight",
        "layer1.1.conv2.weight",
        "layer2.0.downsample.0.weight",
    } < names
    assert len(spec.groups) == 4 + 8  # streams, and the inside of each block


def test_groups__of_a_vit_are_stream_heads_and_hidden_layers() -> None:
    spec = find_groups(build("small_vit"), (32, 32))
    assert sorted(group.size for group in spec.groups) == [4, 4, 4, 24, 40, 40, 40]
    (heads, *_) = [group for group in spec.groups if group.size == 4]
    weight = [place for place in heads.places if place.tensor.endswith("in_proj_weight")]
    assert [(place.axis, place.offset, place.block) for place in weight] == [
        (0, 0, 6),
        (0, 24, 6),
        (0, 48, 6),
    ]


def test_groups__the_images_and_the_classes_keep_their_order() -> None:
    for name in ("resnet18", "small_vit"):
        spec = find_groups(build(name), (32, 32))
        places = {(place.tensor, place.axis) for group in spec.groups for place in group.places}
        head, stem = {"resnet18": ("fc", "conv1"), "small_vit": ("heads.head", "conv_proj")}[name]
        assert (f"{head}.weight", 1) in places
        assert (f"{stem}.weight", 0) in places
        assert not {(f"{head}.weight", 0), (f"{head}.bias", 0), (f"{stem}.weight", 1)} & places


def test_permute__there_and_back_in_any_type_leaves_the_arguments_alone() -> None:
    model = build("squeezenet1_1").to(torch.bfloat16)
    spec, tensors = find_groups(model, (32, 32)), state(model)
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    order = shuffled(spec, 3)
    there = permute(tensors, spec, order)
    back = permute(there, spec, inverse(order))
    assert num_moved(order) > 1000
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert all(torch.equal(copies[name], tensors[name]) for name in tensors)
    assert not any(torch.equal(there[name], tensors[name]) for name in tensors if "weight" in name)
    assert all(there[name].dtype == tensors[name].dtype for name in tensors)


def test_permute__a_missing_tensor_is_named() -> None:
    model = build("squeezenet1_1")
    spec, tensors = find_groups(model, (32, 32)), state(model)
    del tensors["features.3.squeeze.weight"]
    with pytest.raises(ModelError, match=r"'features\.3\.squeeze\.weight' is missing"):
        permute(tensors, spec, shuffled(spec, 0))


# -- small networks with one peculiarity each ----------------------------------------------------------


class Net(nn.Module):
    """A stem of 12 channels, something peculiar, and a head."""

    def __init__(self, width: int = 12, **layers: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.head = nn.Linear(width, 4)

    def forward(self, images: Tensor) -> Tensor:
        answer: Tensor = self.head(self.peculiar(self.stem(images).tanh()))
        return answer

    def peculiar(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class UsedTwice(Net):
    def peculiar(self, x: Tensor) -> Tensor:
        return self.shared(self.shared(x)).mean((2, 3))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__(first=nn.Linear(12, 12), second=nn.Linear(12, 12))
        self.second.weight = self.first.weight

    def peculiar(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.mean((2, 3))).relu())


class TiedBack(Net):
    """The layer that goes back has the weight of the one that goes there, and is not understood."""

    def __init__(self) -> None:
        super().__init__(there=nn.Conv2d(12, 7, 3), back=nn.ConvTranspose2d(7, 12, 3))
        self.back.weight = self.there.weight

    def peculiar(self, x: Tensor) -> Tensor:
        return self.back(self.there(x).tanh()).mean((2, 3))


class PreActivation(Net):
    def peculiar(self, x: Tensor) -> Tensor:
        x = x + self.inner(F.relu(self.norm(x)))
        x += 2 * x
        return torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)


class Shuffle(Net):
    def peculiar(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)
        return x.mean((2, 3))


class Sliced(Net):
    def peculiar(self, x: Tensor) -> Tensor:
        return self.last(x)[:, :6].mean(dim=[2, 3])


class Row(Net):
    """Takes one pixel of each channel."""

    def peculiar(self, x: Tensor) -> Tensor:
        return self.last(x)[..., 0, 1:2].squeeze(-1)


class Scaled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(12, 1, 1))
        self.matrix = nn.Parameter(torch.rand(12, 12))

    def peculiar(self, x: Tensor) -> Tensor:
        return F.linear((self.scale * x).amax(dim=(2, 3)), self.matrix)


class Table(Net):
    """Multiplies with a constant of its own, which all models share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.rand(12, 1, 1))

    def peculiar(self, x: Tensor) -> Tensor:
        return (x * self.table).mean((2, 3))


class Joined(Net):
    def peculiar(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), x, self.right(x)], 1)
        return (self.norm(x) + self.last(x)).flatten(2).mean(-1)


class Gram(Net):
    """Multiplies activations with each other."""

    def peculiar(self, x: Tensor) -> Tensor:
        x = self.last(x).flatten(2)
        return torch.matmul(x, x.transpose(1, 2)).flatten(1)


class Weighted(nn.Conv2d):
    """Not the convolution that it derives from."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * torch.arange(1, self.out_channels + 1)[:, None, None]


def conv(width: int, out: int, **options: int) -> nn.Conv2d:
    return nn.Conv2d(width, out, 3, padding=1, **options)


PECULIAR: dict[str, tuple[Net, set[str]]] = {
    "a module used twice": (UsedTwice(shared=conv(12, 12)), {"stem.weight:0"}),
    "tied weights": (Tied(), {"stem.weight:0"}),
    "tied weights of a layer that is not understood": (TiedBack(), set()),
    "pre-activation": (PreActivation(norm=nn.BatchNorm2d(12), inner=conv(12, 12)), {"stem.weight:0"}),
    "channel shuffle": (Shuffle(), set()),
    "half of the channels": (Sliced(6, last=conv(12, 8)), {"stem.weight:0"}),
    "one pixel": (Row(last=conv(12, 12)), {"stem.weight:0", "last.weight:0"}),
    "own parameters": (Scaled(), {"stem.weight:0", "matrix:0"}),
    "a constant": (Table(), set()),
    "concatenation": (
        Joined(32, left=conv(12, 8), right=conv(12, 12), norm=nn.BatchNorm2d(32), last=conv(32, 32)),
        {"stem.weight:0", "left.weight:0", "right.weight:0"},
    ),
    "activations times activations": (Gram(64, last=conv(12, 8)), {"stem.weight:0"}),
    "a class that derives from a convolution": (UsedTwice(shared=Weighted(12, 12, 3)), set()),
}


def preserved(model: nn.Module) -> Spec:
    spec = find_groups(restless(model), (32, 32))
    assert error_of(model, spec) < 1e-10
    return spec


@pytest.mark.parametrize("case", PECULIAR)
def test_groups__of_peculiar_networks(case: str) -> None:
    model, expected = PECULIAR[case]
    if expected:
        assert {group.name for group in preserved(model).groups} == expected
    else:
        with pytest.raises(ModelError, match="nothing in it can be permuted"):
            find_groups(restless(model), (32, 32))


def sequence(*layers: nn.Module, width: int) -> nn.Module:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(nn.Conv2d(3, 12, 3, 2), nn.Tanh(), *layers, *pool, nn.Linear(width, 4))


@pytest.mark.parametrize(
    ("layers", "width", "sizes"),
    [
        ([conv(12, 12, groups=12)], 12, [12]),
        ([conv(12, 48, groups=12), nn.BatchNorm2d(48)], 48, [12]),
        ([conv(12, 24, groups=4), nn.ReLU()], 24, [4]),
        ([conv(12, 24, groups=4), conv(24, 24, groups=8)], 24, []),
        ([nn.GroupNorm(1, 12), nn.PReLU(12)], 12, [12]),
        ([nn.GroupNorm(12, 12), nn.PReLU()], 12, [12]),
        ([nn.GroupNorm(3, 12), conv(12, 7)], 7, [7]),
        ([nn.LocalResponseNorm(3), conv(12, 7)], 7, [7]),
        ([nn.ConvTranspose2d(12, 8, 2), conv(8, 7)], 7, [7]),
        ([nn.InstanceNorm2d(12, affine=True), nn.MaxPool2d(2)], 12, [12]),
        ([nn.Softmax(1), nn.Dropout2d(), nn.ZeroPad2d(1)], 12, [12]),
        ([nn.PixelShuffle(2), conv(3, 7)], 7, [7]),
        ([nn.Unflatten(1, (12, 1)), nn.Flatten(1, 2), conv(12, 7)], 7, [12, 7]),
    ],
)
def test_groups__of_layers(layers: list[nn.Module], width: int, sizes: list[int]) -> None:
    model = sequence(*layers, width=width)
    if sizes:
        assert [group.size for group in preserved(model).groups] == sizes
    else:
        with pytest.raises(ModelError, match="nothing in it"):
            find_groups(model, (32, 32))


def test_groups__a_layer_with_a_hook_is_not_understood() -> None:
    model = sequence(conv(12, 7), width=7)
    model[2].register_forward_hook(lambda module, args, output: output.flip(1))
    with pytest.raises(ModelError, match="nothing in it"):
        find_groups(model, (32, 32))


def test_find_groups__a_forward_that_cannot_be_traced() -> None:
    with pytest.raises(ModelError, match=r"cannot be followed .*families.*resnet.*vit"):
        find_groups(branching_cnn(3), (32, 32))


def test_find_groups__a_network_without_hidden_units() -> None:
    with pytest.raises(ModelError, match=r"Sequential cannot be aligned: nothing.*resnet"):
        find_groups(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), (8, 8))
