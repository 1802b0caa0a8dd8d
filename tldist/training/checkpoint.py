"""Checkpoints: all state in safetensors and JSON, with hashes and a commit marker; never pickle."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from tldist.bundle import verify_files
from tldist.errors import BundleError
from tldist.files import atomic_folder, read_json, remove_leftovers, sha256_file
from tldist.models.load import save_tensors
from tldist.progress import warn

MODEL, OPTIMIZER, STATE, COMMIT = "model.safetensors", "optimizer.safetensors", "state.json", "COMMIT"
AVERAGE, AUXILIARY = "average.safetensors", "auxiliary.safetensors"


@dataclass
class Position:
    """Where a run stands; with (seed, recipe) it determines all that is random.

    Attributes:
        step: optimiser steps done.
        samples: samples seen.
        measured: steps done when the model was last measured on validation.
        best: step, score and loss of the best measurement so far, if any.
        broken: broken images met so far, by position in the training domain.
        scaler: state of fp16's loss scaling.
    """

    step: int = 0
    samples: int = 0
    measured: int = 0
    best: dict[str, float] | None = None
    broken: dict[str, str] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)

    @property
    def best_step(self) -> int | None:
        """Steps done at the best measurement."""
        return int(self.best["step"]) if self.best else None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def position(self) -> Position:
        """Where the run stood."""
        return Position(**read_json(self.path / STATE, BundleError, "training state"))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of `MODEL` or `OPTIMIZER`."""
        return load_file(self.path / name)

    def result(self) -> dict[str, Tensor]:
        """The weights to keep: the averaged ones where they are averaged; without the frozen ones."""
        if not (self.path / AVERAGE).is_file():
            return self.tensors(MODEL)
        averaged = self.tensors(AVERAGE)
        return {
            name.removeprefix("module."): tensor
            for name, tensor in averaged.items()
            if name.startswith("module.")
        }

    def is_whole(self) -> bool:
        """Whether every file is there and has the hash in the commit marker."""
        try:
            verify_files(self.path, read_json(self.path / COMMIT, BundleError, "commit marker"), BundleError)
            self.position()
        except (BundleError, TypeError, SafetensorError) as problem:
            warn(f"the checkpoint {self.path.name} is not used: {problem}")
            return False
        return True


def save_checkpoint(folder: Path, state: Mapping[str, dict[str, Tensor]], position: Position) -> Checkpoint:
    """Write ``folder/step-N`` whole or not at all.

    Args:
        folder: of all checkpoints.
        state: tensors by file name (`MODEL`, `OPTIMIZER`, `AVERAGE`, `AUXILIARY`).
        position: where the run stands.
    """
    path = folder / f"step-{position.step:08d}"
    with atomic_folder(path) as temporary:
        for name, tensors in state.items():
            save_tensors(tensors, temporary / name)
        (temporary / STATE).write_text(json.dumps(asdict(position)), encoding="utf-8")
        hashes = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
        (temporary / COMMIT).write_text(json.dumps(hashes), encoding="utf-8")
    return Checkpoint(path, position.step)


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """All committed checkpoints, oldest first."""
    found = [
        Checkpoint(path, int(path.name[5:])) for path in folder.glob("step-*") if path.name[5:].isdecimal()
    ]
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest one that is whole; a damaged one is passed over with a warning."""
    remove_leftovers(folder)
    return next((found for found in reversed(list_checkpoints(folder)) if found.is_whole()), None)


def retain(folder: Path, keep: int, best_step: int | None, candidates: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep``, the best, and those of the steps ``candidates``."""
    found = list_checkpoints(folder)
    for checkpoint in found[:-keep]:
        if checkpoint.step != best_step and checkpoint.step not in candidates:
            shutil.rmtree(checkpoint.path)


def restore_weights(
    checkpoint: Checkpoint,
    model: nn.Module,
    average: AveragedModel | None,
    auxiliary: nn.Module | None = None,
) -> None:
    """Load the weights, their average where it is kept, what learns beside; frozen ones are there already."""
    model.load_state_dict(checkpoint.tensors(MODEL), strict=False)
    if average is not None:
        average.load_state_dict(checkpoint.tensors(AVERAGE), strict=False)
    if auxiliary is not None:
        auxiliary.load_state_dict(checkpoint.tensors(AUXILIARY))
