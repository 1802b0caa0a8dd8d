"""The models that teach, and what they say of a batch of the student's pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tldist.bundle import BundleConfig
from tldist.errors import BundleError, ModelError
from tldist.files import canonical_json, sha256_text
from tldist.models.heads import find_head, head_width, tapped
from tldist.models.load import input_tensor, load_bundle
from tldist.runtime.preprocess import Preprocessing
from tldist.training.precision import Numerics


@dataclass(frozen=True)
class Teacher:
    """One model that teaches.

    Attributes:
        folder: the bundle, as it was asked for.
        net: the module, in evaluation mode.
        config: what it is.
        share: of the vote; all together 1.
    """

    folder: Path
    net: nn.Module
    config: BundleConfig
    share: float


def load_teachers(
    folders: Sequence[Path], shares: Sequence[float] | None = None, *, trust_code: bool = False
) -> list[Teacher]:
    """Load bundles as teachers, on the CPU.

    Args:
        folders: bundles, or runs that hold one.
        shares: weight of each, not negative, not all 0; None: all equal.
        trust_code: allow a bundle that names code of its own.

    Raises:
        BundleError: not a bundle, damaged, without classes, or with several classes an image.
    """
    weights = list(shares or [1.0] * len(folders))
    found = []
    for folder, weight in zip(folders, weights, strict=True):
        net, config = load_bundle(folder, trust_code=trust_code)
        if not config.classes:
            raise BundleError(f"{folder}: a feature extractor without classes; it has no answer to teach.")
        if config.task != "multiclass":
            raise BundleError(f"{folder}: answers with any number of classes; distill teaches one an image.")
        found.append(Teacher(folder, net, config, weight / sum(weights)))
    return found


@dataclass(frozen=True)
class Layout:
    """Where things lie in a row of what is taught of one image: ``[label, J logits, D features]``.

    Attributes:
        logits: outputs of each teacher, sum J.
        features: features of each teacher, sum D; empty where features are not compared.
    """

    logits: tuple[int, ...]
    features: tuple[int, ...]

    @property
    def width(self) -> int:
        """J + D: what the teachers say of one image."""
        return sum(self.logits) + sum(self.features)

    def split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """float rows (N, 1 + J + D) to int64 labels (N,), logits (N, J), features (N, D)."""
        label, logits, features = rows.split([1, sum(self.logits), sum(self.features)], 1)
        return label[:, 0].long(), logits, features


def layout_of(teachers: Sequence[Teacher], with_features: bool) -> Layout:
    """How the teachers' outputs lie in a row."""
    widths = tuple(head_width(find_head(teacher.net)[1]) for teacher in teachers) if with_features else ()
    return Layout(tuple(len(teacher.config.classes) for teacher in teachers), widths)


def identity_of(teachers: Sequence[Teacher], layout: Layout) -> str:
    """A hash of what the outputs in a row depend on, the images apart."""
    return sha256_text(
        canonical_json([[teacher.config.identity for teacher in teachers], list(layout.features)])
    )


def resized(images: Tensor, how: Preprocessing) -> Tensor:
    """uint8 images (N, H, W, 3) to a model's input size: as they are where they have it, else float32 in
    [0, 255], antialiased. The whole picture stays in sight: another aspect ratio distorts it."""
    size = (how.height, how.width)
    if tuple(images.shape[1:3]) == size:
        return images
    picture = images.permute(0, 3, 1, 2).float()
    changed = nn.functional.interpolate(picture, size, mode=how.interpolation, antialias=True)
    return changed.clamp(0, 255).permute(0, 2, 3, 1)


def answering(
    teachers: Sequence[Teacher], layout: Layout, numerics: Numerics, most: int = 256
) -> Callable[[Tensor], Tensor]:
    """All teachers as one function, without gradients.

    Each sees the student's pixels (as arXiv:2106.05237 found best) through its own size and normalisation;
    its logits are divided by its calibrated temperature, so that teachers are compared as sure as they are.

    Args:
        teachers: on the device.
        layout: theirs.
        numerics: what they compute in.
        most: images that they handle at once.

    Returns:
        uint8 images (N, H, W, 3) on the device to float32 (N, J + D).
    """
    dtype = torch.bfloat16 if numerics.precision == "bf16" else torch.float16

    @torch.no_grad()
    def answer(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, dtype=dtype, enabled=numerics.precision != "fp32"):
            said = [_outputs(teacher, images, numerics, bool(layout.features)) for teacher in teachers]
        logits, features = zip(*said)
        return torch.cat([*logits, *features] if layout.features else [*logits], 1)

    return lambda images: torch.cat([answer(part) for part in images.split(most)])


def _outputs(
    teacher: Teacher, images: Tensor, numerics: Numerics, with_features: bool
) -> tuple[Tensor, Tensor]:
    """float32 calibrated logits (N, K_t), and features (N, D_t) (the logits again where none are asked)."""
    how = teacher.config.preprocessing
    if teacher.net.training:  # setting it walks through every module
        teacher.net.eval()
    inputs = input_tensor(resized(images, how), how, numerics.memory_format)
    if with_features:
        with tapped(teacher.net) as features:
            logits, seen = teacher.net(inputs), features()
    else:
        logits = seen = teacher.net(inputs)
    if logits.shape[1:] != (len(teacher.config.classes),):
        raise ModelError(
            f"{teacher.folder}: outputs of shape {tuple(logits.shape[1:])} for "
            f"{len(teacher.config.classes)} class names."
        )
    return logits.float() / teacher.config.temperature, seen.float()
