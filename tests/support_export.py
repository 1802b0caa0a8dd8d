"""Small bundles and packages for the tests of export and runtime, and ways to damage them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from tldist import api
from tldist.bundle import BundleConfig
from tldist.files import sha256_file
from tldist.models.load import save_bundle
from tldist.models.zoo import build_network, describe_network
from tldist.runtime.preprocess import Preprocessing

CLASSES = ("10", "2", "robe d'été", "t-shirt, white")
"""Names that sort, quote and encode in awkward ways."""
SMALL = Preprocessing(height=40, width=40, resize=46, interpolation="bicubic")


def write_bundle_of(
    path: Path, name: str, classes: tuple[str, ...] = CLASSES, how: Preprocessing = SMALL, seed: int = 0
) -> Path:
    """Write a bundle of a network (a torchvision name, or ``module:function``) with random weights."""
    torch.manual_seed(seed)
    description = describe_network(name, len(classes))
    model = build_network(description, trust_code=True)
    save_bundle(path, model.eval(), BundleConfig(description, classes, how, {"stage": "test"}))
    return path


def export_squeezenet(folder: Path) -> tuple[Path, Path]:
    """A bundle and its package with logits and features (5 MB each)."""
    bundle = write_bundle_of(folder / "bundle", "squeezenet1_1")
    api.export(bundle=str(bundle), out=folder / "package", output="both", samples=3)
    return bundle, folder / "package"


def damage(
    package: Path, copy: Path, change: Callable[[onnx.ModelProto], None], *, rehash: bool = True
) -> Path:
    """A copy of a package whose graph was changed; with ``rehash`` its records agree with the new file."""
    shutil.copytree(package, copy)
    file = copy / "model.onnx"
    proto = onnx.load(file)
    change(proto)
    onnx.save(proto, file)
    if rehash:
        certificate = json.loads((copy / "parity.json").read_text())
        certificate["files"]["model.onnx"] = sha256_file(file)
        (copy / "parity.json").write_text(json.dumps(certificate))
        edit_record(copy, files={n: sha256_file(copy / n) for n in ("model.onnx", "parity.json")})
    return copy


def edit_record(package: Path, *, files: dict[str, str] | None = None, **values: object) -> None:
    """Change ``package.json``."""
    record = json.loads((package / "package.json").read_text())
    record["files"] |= files or {}
    record |= values
    (package / "package.json").write_text(json.dumps(record))


def small_vit(num_classes: int) -> nn.Module:
    """A vision transformer of two thin layers, its head not zero."""
    model = VisionTransformer(40, 8, 2, 2, 32, 64, num_classes=num_classes)
    nn.init.normal_(model.heads.head.weight)
    return model


class _ActsUp(nn.Module):
    """Computes something else while it is exported, as a faulty exporter would."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(1) if torch.compiler.is_exporting() else images


def acts_up(num_classes: int) -> nn.Module:
    """A network whose exported graph has the channels swapped."""
    return nn.Sequential(
        _ActsUp(),
        nn.Conv2d(3, 8, 3, stride=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


class _ActsUpAlways(nn.Module):
    """Computes something else for every exporter."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flip(1) if torch.compiler.is_exporting() or torch.jit.is_tracing() else images


def acts_up_always(num_classes: int) -> nn.Module:
    """A network whose graph has the channels swapped, whichever exporter makes it."""
    return nn.Sequential(_ActsUpAlways(), *list(acts_up(num_classes))[1:])


def free_cnn(num_classes: int) -> nn.Module:
    """A small network that takes images of any size."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, num_classes),
    )


def pooled_cnn(num_classes: int) -> nn.Module:
    """A network that takes images of any size, by a pooling that exporters fix to one size."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.AdaptiveAvgPool2d(6), nn.Flatten(), nn.Linear(144, num_classes)
    )


class _Decides(nn.Module):
    """Branches on a value, which no exported graph can."""

    def forward(self, images: Tensor) -> Tensor:
        return images if images.mean() > 0 else -images


def decides(num_classes: int) -> nn.Module:
    """A network that cannot be exported."""
    return nn.Sequential(_Decides(), nn.Flatten(), nn.Linear(3 * 40 * 40, num_classes))


class _FloatOnly(nn.Module):
    """Insists on float32."""

    def forward(self, features: Tensor) -> Tensor:
        return features @ torch.eye(4)


def float_only(num_classes: int) -> nn.Module:
    """A network that does not run in float64."""
    layers = (
        nn.Conv2d(3, 4, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        _FloatOnly(),
        nn.Linear(4, num_classes),
    )
    return nn.Sequential(*layers)


class _SmallCnn(nn.Module):
    """A stem and a residual block with BatchNorm, which exporters fold into the convolutions."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.act = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)
        for norm in (self.norm, self.norm2):
            nn.init.uniform_(norm.running_var, 0.5, 2.0)
            nn.init.normal_(norm.running_mean, std=0.1)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, images: Tensor) -> Tensor:
        first = self.act(self.norm(self.stem(images)))
        second = torch.relu(self.norm2(self.conv(first)) + first)
        return self.fc(self.pool(second).flatten(1))


def small_cnn(num_classes: int) -> nn.Module:
    """A network that exports in a second or two, of nodes that optimisers fuse."""
    return _SmallCnn(num_classes)


def export_small_cnn(folder: Path) -> tuple[Path, Path]:
    """A bundle and its package with logits and probabilities."""
    bundle = write_bundle_of(folder / "bundle", "tests.support_export:small_cnn")
    api.export(bundle=str(bundle), out=folder / "package", output="probabilities", samples=4, trust_code=True)
    return bundle, folder / "package"
