"""The samples that a package carries: images, and what PyTorch answered for them.

With them a package can be checked where it serves, without torch. One safetensors file: ``images`` (uint8),
``expected.NAME`` (float32) and ``referee.NAME`` (float64) for each output.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tldist.errors import PackageError

_EXPECTED, _REFEREE = "expected.", "referee."


@dataclass(frozen=True)
class Samples:
    """Images to compare on, group by group.

    Attributes:
        images: uint8 (N, H, W, 3).
        groups: (name, number of images) in order; the numbers add up to N.
        ids: a name for each image, (N,).
    """

    images: np.ndarray
    groups: tuple[tuple[str, int], ...]
    ids: tuple[str, ...]

    @property
    def group_of(self) -> np.ndarray:
        """(N,) of text: the group of each image."""
        return np.repeat([name for name, _ in self.groups], [count for _, count in self.groups])


@dataclass(frozen=True)
class Reference:
    """Samples with PyTorch's answers.

    Attributes:
        samples: the images.
        expected: float32 (N, D) of each output: the bundle in float32.
        referee: float64 (N, D) of each output: the bundle in float64; empty where it cannot run so.
    """

    samples: Samples
    expected: dict[str, np.ndarray]
    referee: dict[str, np.ndarray] = field(default_factory=dict)


def write_reference(path: Path, reference: Reference) -> None:
    """Write a reference as one safetensors file."""
    tensors = {"images": reference.samples.images}
    tensors |= {_EXPECTED + name: values for name, values in reference.expected.items()}
    tensors |= {_REFEREE + name: values for name, values in reference.referee.items()}
    about = {"groups": json.dumps(reference.samples.groups), "ids": json.dumps(reference.samples.ids)}
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path, metadata=about)


def read_reference(path: Path) -> Reference:
    """Read a reference.

    Raises:
        PackageError: missing, damaged, or not a reference.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        groups = tuple((str(name), int(count)) for name, count in json.loads(about["groups"]))
        samples = Samples(tensors["images"], groups, tuple(json.loads(about["ids"])))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise PackageError(f"{path}: cannot be read as reference samples: {error}.") from error
    return Reference(samples, _part(tensors, _EXPECTED), _part(tensors, _REFEREE))


def _part(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
