"""From pictures to class names or vectors with a package: paths, bytes or arrays in, answers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np

from tldist.bundle import Task
from tldist.errors import PackageError
from tldist.runtime.decode import BadImage
from tldist.runtime.package import FEATURES, LOGITS, PROBABILITIES, Package
from tldist.runtime.sources import Source as Source
from tldist.runtime.sources import run_sources


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


@overload
def predict(
    package: Package,
    sources: Sequence[Source],
    batch_size: int = 32,
    top: int = 5,
    *,
    workers: int | None = None,
    errors: Literal["raise"] = "raise",
) -> list[Prediction]: ...


@overload
def predict(
    package: Package,
    sources: Sequence[Source],
    batch_size: int = 32,
    top: int = 5,
    *,
    workers: int | None = None,
    errors: Literal["return"],
) -> list[Prediction | BadImage]: ...


def predict(
    package: Package,
    sources: Sequence[Source],
    batch_size: int = 32,
    top: int = 5,
    *,
    workers: int | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> list[Prediction] | list[Prediction | BadImage]:
    """Classify pictures.

    Args:
        package: of a classifier.
        sources: paths, bytes or arrays, in any mixture.
        batch_size: pictures that run at once.
        top: how many classes to name.
        workers: threads that decode while the graph runs; 0: none; None: by the number of cores.
        errors: ``raise`` the first source that cannot be decoded, or ``return`` its error in its place.

    Returns:
        One prediction a source, in order.

    Raises:
        PackageError: the package is no classifier.
        BadImage: a source cannot be decoded; the message names it.
    """
    config = package.config
    if not config.classes:
        raise PackageError(
            f"{package.path}: has no classes: a feature extractor. Use tldist.runtime.predict.features."
        )
    found: dict[int, Prediction | BadImage] = {}
    for answer in run_sources(package, sources, batch_size=batch_size, workers=workers, errors=errors):
        found |= dict(answer.bad)
        if answer.places:
            rows = probabilities(answer.outputs, config.temperature, config.task)
            for place, row in zip(answer.places, rows):
                found[place] = _prediction(row, config.classes, top)
    return [found[place] for place in range(len(sources))]


@overload
def features(
    package: Package,
    sources: Sequence[Source],
    batch_size: int = 32,
    *,
    output: str = FEATURES,
    workers: int | None = None,
    errors: Literal["raise"] = "raise",
) -> np.ndarray: ...


@overload
def features(
    package: Package,
    sources: Sequence[Source],
    batch_size: int = 32,
    *,
    output: str = FEATURES,
    workers: int | None = None,
    errors: Literal["return"],
) -> list[np.ndarray | BadImage]: ...


def features(
    package: Package,
    sources: Sequence[Source],
    batch_size: int = 32,
    *,
    output: str = FEATURES,
    workers: int | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> np.ndarray | list[np.ndarray | BadImage]:
    """Vectors of pictures.

    Args:
        package: that gives features.
        sources, batch_size, workers, errors: as for `predict`.
        output: which of the graph's outputs.

    Returns:
        float32 (N, D), a row a source in order; with ``errors="return"`` a list of rows (D,), with errors
        in the places of the sources that cannot be decoded.

    Raises:
        PackageError: the package has no such output.
        BadImage: a source cannot be decoded; the message names it.
    """
    if output not in package.config.outputs:
        raise PackageError(
            f"{package.path}: gives {', '.join(package.config.outputs)}, not '{output}'. "
            f"Export the bundle with output=features or output=both."
        )
    rows = np.full((len(sources), package.config.outputs[output]), np.nan, np.float32)
    bad: dict[int, BadImage] = {}
    for answer in run_sources(package, sources, batch_size=batch_size, workers=workers, errors=errors):
        bad |= dict(answer.bad)
        if answer.places:
            rows[list(answer.places)] = answer.outputs[output]
    return [bad.get(place, rows[place]) for place in range(len(rows))] if errors == "return" else rows


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


def _prediction(row: np.ndarray, classes: tuple[str, ...], top: int) -> Prediction:
    order = np.argsort(-row, kind="stable")[:top]
    ranked = tuple((classes[place], float(row[place])) for place in order)
    return Prediction(ranked[0][0], ranked[0][1], ranked)
