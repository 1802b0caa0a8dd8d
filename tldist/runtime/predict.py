"""From pictures to class names with a package: paths, bytes or arrays in, labels and probabilities out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from tldist.bundle import Task
from tldist.errors import PackageError
from tldist.runtime.decode import BadImage, read_bytes
from tldist.runtime.package import LOGITS, PROBABILITIES, Package
from tldist.runtime.preprocess import Preprocessing, fit, prepare

Source = str | os.PathLike[str] | bytes | np.ndarray
"""A path, the bytes of an image file, or a decoded picture: uint8 (H, W, 3), RGB, of any size."""


@dataclass(frozen=True)
class Prediction:
    """What the model says about one picture.

    Attributes:
        label: name of the most probable class.
        probability: of that class, 0 to 1.
        top: (name, probability) of the most probable classes, best first.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]


def predict(
    package: Package, sources: Sequence[Source], batch_size: int = 32, top: int = 5
) -> list[Prediction]:
    """Classify pictures.

    Args:
        package: of a classifier.
        sources: paths, bytes or arrays, in any mixture.
        batch_size: pictures that run at once.
        top: how many classes to name.

    Returns:
        One prediction a source, in order.

    Raises:
        PackageError: the package is no classifier.
        BadImage: a source cannot be decoded; the message names it.
    """
    if not package.config.classes:
        raise PackageError(f"{package.path}: has no classes: a feature extractor. Use Package.run.")
    found: list[Prediction] = []
    for start in range(0, len(sources), batch_size):
        chunk = sources[start : start + batch_size]
        named = [(f"source {place}", source) for place, source in enumerate(chunk, start)]
        images = [_prepare(source, name, package.config.preprocessing) for name, source in named]
        for row in probabilities(
            package.run(np.stack(images)), package.config.temperature, package.config.task
        ):
            found.append(_prediction(row, package.config.classes, top))
    return found


def probabilities(
    outputs: dict[str, np.ndarray], temperature: float = 1.0, task: Task = "multiclass"
) -> np.ndarray:
    """A package's outputs to probabilities (N, K): its own, else ``softmax(logits / temperature)``; for
    multilabel, each ``sigmoid(logit / temperature)`` by itself."""
    if PROBABILITIES in outputs:
        return outputs[PROBABILITIES].astype(np.float64)
    logits = outputs[LOGITS].astype(np.float64) / temperature
    if task == "multilabel":
        alone: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -700, 700)))
        return alone
    powers = np.exp(logits - logits.max(1, keepdims=True))
    values: np.ndarray = powers / powers.sum(1, keepdims=True)
    return values


def _prepare(source: Source, name: str, how: Preprocessing) -> np.ndarray:
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3 or not source.size:
            raise BadImage(f"{name}: expected uint8 (H, W, 3), found {source.dtype} {source.shape}")
        return fit(Image.fromarray(source), how)
    try:
        if isinstance(source, bytes):
            return prepare(source, how)
        name = os.fspath(source)
        return prepare(read_bytes(source), how)
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from error


def _prediction(row: np.ndarray, classes: tuple[str, ...], top: int) -> Prediction:
    order = np.argsort(-row, kind="stable")[:top]
    ranked = tuple((classes[place], float(row[place])) for place in order)
    return Prediction(ranked[0][0], ranked[0][1], ranked)
