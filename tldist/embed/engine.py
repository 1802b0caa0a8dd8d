"""What computes the vectors: a bundle with PyTorch, or a package with ONNX Runtime, by what is passed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from tldist.bundle import is_bundle, read_bundle
from tldist.embed.recipe import EmbedRecipe
from tldist.errors import BundleError, PackageError, RecipeError, needs
from tldist.process import core_count
from tldist.runtime.package import FEATURES, Package, is_package, read_package
from tldist.runtime.preprocess import Preprocessing

Embed = Callable[[np.ndarray], np.ndarray]
"""uint8 images (B, H, W, 3) to float32 features (B, D)."""


class Team(Protocol):
    """The processes of this job, as far as embedding needs to know them."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def local_size(self) -> int: ...

    def wait(self) -> None:
        """Wait until all processes are here."""
        ...


@dataclass(frozen=True)
class Launched:
    """A process that a launcher numbered in its environment; nothing connects it to the others."""

    rank: int
    size: int
    local_size: int

    @classmethod
    def from_environment(cls) -> Launched:
        """This process, by RANK, WORLD_SIZE and LOCAL_WORLD_SIZE."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))

    def wait(self) -> None:
        """Nothing to wait by: the commit markers tell who has done what."""


@dataclass(frozen=True)
class Model:
    """A model that was asked for, before it is loaded.

    Attributes:
        path: the bundle's or the package's folder.
        engine: what will compute it.
        identity: hash of what it computes.
        preprocessing: from an image to its input.
    """

    path: Path
    engine: Literal["torch", "onnx"]
    identity: str
    preprocessing: Preprocessing


def find_model(recipe: EmbedRecipe) -> Model:
    """What the recipe's ``model`` is; reads its description, not its weights.

    Raises:
        BundleError, PackageError: it is neither a bundle nor a package, or gives no features.
        RecipeError: a precision is asked of a package that was exported with its own.
    """
    path = Path(str(recipe.model))
    if is_package(path):
        return _find_package(path, recipe)
    if not any(is_bundle(folder) for folder in (path, path / "bundle")):
        raise BundleError(f"{path}: expected a bundle, a run that holds one, or a package (`tldist export`).")
    folder, bundle = read_bundle(path, verify=False)  # its hashes are checked when the weights are read
    return Model(folder, "torch", bundle.identity, bundle.preprocessing)


def _find_package(path: Path, recipe: EmbedRecipe) -> Model:
    config = read_package(path, verify=False)  # as above
    if FEATURES not in config.outputs:
        raise PackageError(
            f"{path}: the package gives {', '.join(config.outputs)}, but no features. Export the bundle with "
            f"output=features or output=both."
        )
    if recipe.precision != "fp32":
        raise RecipeError(
            f"precision={recipe.precision}: a package computes as it was exported; leave precision out, and "
            f"choose it with the profile of `tldist export`."
        )
    return Model(path, "onnx", config.identity, config.preprocessing)


def join(model: Model) -> Team:
    """Join the job that the launcher started; with PyTorch that chooses this process's device too."""
    if model.engine == "onnx":
        return Launched.from_environment()
    with needs("train"):
        from tldist.embed.torch_engine import join_team

    return join_team()


def load_engine(model: Model, recipe: EmbedRecipe, team: Team) -> Embed:
    """Load the weights.

    Raises:
        BundleError, PackageError: damaged.
        MachineError: this machine cannot compute in that precision.
    """
    if model.engine == "onnx":
        return _load_package(model, team)
    from tldist.embed.torch_engine import TorchEngine

    return TorchEngine(model.path, recipe.precision, recipe.trust_code)


def _load_package(model: Model, team: Team) -> Embed:
    cores = core_count()
    package = Package.open(model.path, threads=max(1, cores // team.local_size))

    def embed(images: np.ndarray) -> np.ndarray:
        return package.run(images)[FEATURES]

    return embed
