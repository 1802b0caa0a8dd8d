"""What model folders say about themselves: read, verified by hash, written whole or not at all.

A bundle is ``config.json`` + ``model.safetensors`` + ``README.md``. Its configuration is plain data from
which `tldist.models` rebuilds the module; nothing in a bundle is ever executed or unpickled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from tldist import __version__
from tldist.errors import BundleError
from tldist.files import atomic_folder, canonical_json, read_json, sha256_file, sha256_text, write_json
from tldist.runtime.preprocess import Preprocessing

Task = Literal["multiclass", "multilabel"]
"""One class an image, by softmax; or any number of them, by sigmoid."""

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
FORMAT = "tldist.bundle/1"


class _Stored(BaseModel):
    """The layout of ``config.json``; anything else is refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    format: str
    model: dict[str, Any]
    classes: list[str]
    preprocessing: dict[str, Any]
    files: dict[str, str]
    temperature: float = 1.0
    task: Task = "multiclass"
    lineage: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    tldist: str = ""


@dataclass(frozen=True)
class BundleConfig:
    """What a bundle is, without its weights.

    Attributes:
        model: description of the module as plain data (`tldist.models.description`).
        classes: class names in the order of the head's outputs; empty for a feature extractor.
        preprocessing: from a decoded image to the model's uint8 input, and the normalisation.
        lineage: how it came to be: stage, recipe, parents by hash, data.
        metrics: what was measured when it was made.
        files: SHA-256 of every file.
        temperature: probabilities are ``softmax(logits / temperature)``, or ``sigmoid`` of that.
        task: multiclass (one class an image, softmax) or multilabel (any number of them, sigmoid).
    """

    model: dict[str, Any]
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    lineage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    temperature: float = 1.0
    task: Task = "multiclass"

    @property
    def identity(self) -> str:
        """Hash of what the bundle computes: description, classes, task, preprocessing, temperature,
        weights."""
        weights = self.files.get(WEIGHTS, "")
        parts = [self.model, list(self.classes), self.preprocessing.to_dict(), self.temperature, weights]
        if self.task != "multiclass":
            parts.append(self.task)
        return sha256_text(canonical_json(parts))


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a bundle (its configuration is there)."""
    return (Path(folder) / CONFIG).is_file()


def find_bundle(path: str | os.PathLike[str]) -> Path:
    """The bundle at ``path``: the folder itself, or ``path/bundle`` where ``path`` is a run.

    Raises:
        BundleError: neither is a bundle.
    """
    folder = Path(path)
    for candidate in (folder, folder / "bundle"):
        if is_bundle(candidate):
            return candidate
    if not folder.exists():
        raise BundleError(f"{folder}: no such folder (expected a bundle: {CONFIG} and {WEIGHTS}).")
    raise BundleError(
        f"{folder}: not a bundle: it has no {CONFIG}. "
        f"A bundle is what `tldist finetune` writes to RUN/bundle."
    )


def read_bundle(path: str | os.PathLike[str], *, verify: bool = True) -> tuple[Path, BundleConfig]:
    """Read a bundle's configuration and check its files.

    Args:
        path: a bundle, or a run that holds one.
        verify: compare every file's SHA-256 with the one recorded.

    Returns:
        The bundle's folder and its configuration.

    Raises:
        BundleError: not a bundle, an unknown format, a missing file, a hash that differs.
    """
    folder = find_bundle(path)
    raw = read_json(folder / CONFIG, BundleError, "bundle configuration")
    try:
        stored = _Stored(**raw)
        preprocessing = Preprocessing.from_dict(stored.preprocessing)
    except (ValidationError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise BundleError(f"{folder / CONFIG}: not a bundle configuration: {reason}.") from error
    if stored.format != FORMAT:
        raise BundleError(f"{folder}: bundle format '{stored.format}'; this version reads '{FORMAT}'.")
    if WEIGHTS not in stored.files:
        raise BundleError(f"{folder / CONFIG}: no hash is recorded for {WEIGHTS}; the bundle is incomplete.")
    if verify:
        verify_files(folder, stored.files, BundleError)
    return folder, BundleConfig(
        stored.model,
        tuple(stored.classes),
        preprocessing,
        stored.lineage,
        stored.metrics,
        stored.files,
        stored.temperature,
        stored.task,
    )


def verify_files(folder: Path, files: dict[str, str], error: type[BundleError] | type[Exception]) -> None:
    """Compare the SHA-256 of files with the recorded ones.

    Raises:
        error: a file is missing, lies outside the folder, or differs.
    """
    for name, expected in files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise error(f"{folder}: the recorded file name '{name}' points outside the folder.")
        if not path.is_file():
            raise error(f"{path}: missing, though the folder's record lists it. Copy the folder again.")
        if sha256_file(path) != expected:
            raise error(
                f"{path}: its SHA-256 differs from the one recorded (damaged or changed). Copy it again."
            )


def write_bundle(
    path: str | os.PathLike[str], config: BundleConfig, write_weights: Callable[[Path], None]
) -> BundleConfig:
    """Write a bundle whole or not at all.

    Args:
        path: the folder to make; an older bundle there is replaced.
        config: what to record (``files`` is filled in here).
        write_weights: writes the safetensors file to the path it is given.

    Returns:
        The configuration with the hashes of the files written.
    """
    with atomic_folder(path) as folder:
        write_weights(folder / WEIGHTS)
        (folder / CARD).write_text(_model_card(config), encoding="utf-8")
        files = {name: sha256_file(folder / name) for name in (WEIGHTS, CARD)}
        written = replace(config, files=files)
        stored = _Stored(
            format=FORMAT,
            model=written.model,
            classes=list(written.classes),
            preprocessing=written.preprocessing.to_dict(),
            files=files,
            temperature=written.temperature,
            task=written.task,
            lineage=written.lineage,
            metrics=written.metrics,
            tldist=__version__,
        )
        write_json(folder / CONFIG, stored.model_dump())
    return written


def parent_record(path: Path, config: BundleConfig) -> dict[str, Any]:
    """How a bundle is named in the lineage of what was made from it."""
    return {"path": str(path), "identity": config.identity, "weights": config.files.get(WEIGHTS, "")}


def _model_card(config: BundleConfig) -> str:
    shape = config.preprocessing
    shown = ", ".join(config.classes[:20]) + (", ..." if len(config.classes) > 20 else "")
    metrics = "\n".join(f"- {name}: {value}" for name, value in config.metrics.items()) or "- not measured"
    data = config.lineage.get("data", "not recorded")
    architecture = config.model.get("name") or config.model.get("type", "model")
    return (
        f"# {architecture}\n\n"
        f"Made by tldist {__version__} ({config.lineage.get('stage', 'unknown stage')}).\n\n"
        f"- classes ({len(config.classes)}): {shown or 'none: a feature extractor'}\n"
        f"- input: RGB {shape.height}x{shape.width}, mean {list(shape.mean)}, std {list(shape.std)}\n"
        f"- data: {data}\n\n"
        f"## Measured\n{metrics}\n\n"
        '## Load\n```python\nimport tldist\nmodel, config = tldist.load_bundle("PATH")\n```\n'
        "A plain classifier's tensors carry the architecture's own names, so "
        '`safetensors.torch.load_file("model.safetensors")` fits the architecture without tldist.\n'
    )
