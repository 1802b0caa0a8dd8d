"""A bundle or a package as one thing: images to logits, with class names and preprocessing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tldist.bundle import BundleConfig, Task, find_bundle
from tldist.distributed import Team
from tldist.errors import BundleError, PackageError
from tldist.models.description import architecture_name
from tldist.models.load import check_outputs, load_bundle
from tldist.process import core_count
from tldist.runtime.package import LOGITS, Package, is_package
from tldist.runtime.preprocess import Preprocessing
from tldist.training.measure import Predict, predictor


@dataclass(frozen=True)
class Classifier:
    """What can be measured.

    Attributes:
        kind: what it is, for people.
        identity: hash of what it computes.
        classes: names of the logits.
        task: one class an image, or any number of them.
        preprocessing: how images become its input.
        predict: uint8 images (N, H, W, 3) to logits (N, K).
    """

    kind: str
    identity: str
    classes: Sequence[str]
    task: Task
    preprocessing: Preprocessing
    predict: Predict


def open_classifier(path: Path, team: Team, *, trust_code: bool = False) -> Classifier:
    """Open a bundle (a run that holds one) or a package.

    Raises:
        BundleError, PackageError: neither, damaged, or without classes.
    """
    return _package(path, team) if is_package(path) else _bundle(path, team, trust_code)


def _bundle(path: Path, team: Team, trust_code: bool) -> Classifier:
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder (expected a bundle, a run that holds one, or a package).")
    model, config = load_bundle(find_bundle(path), trust_code=trust_code)
    _check_classes(config, path)
    check_outputs(model, config)
    name = architecture_name(config.model)
    return Classifier(
        f"bundle of {name}, PyTorch on {team.device.type}",
        config.identity,
        config.classes,
        config.task,
        config.preprocessing,
        predictor(model.to(team.device), config.preprocessing),
    )


def _check_classes(config: BundleConfig, path: Path) -> None:
    if not config.classes:
        raise BundleError(f"{path}: a feature extractor without classes; there is no answer to measure.")


def _package(path: Path, team: Team) -> Classifier:
    cores = core_count()
    package = Package.open(path, threads=max(1, cores // team.local_size))
    if LOGITS not in package.config.outputs or not package.config.classes:
        outputs = ", ".join(package.config.outputs)
        raise PackageError(
            f"{path}: gives {outputs}, no logits to measure. Export the bundle with output=logits."
        )

    def predict(images: Tensor) -> Tensor:
        return torch.from_numpy(package.run(images.cpu().numpy())[LOGITS])

    profile = package.config.profile_name
    return Classifier(
        f"package of profile {profile}, ONNX Runtime",
        package.config.identity,
        package.config.classes,
        package.config.task,
        package.config.preprocessing,
        predict,
    )
