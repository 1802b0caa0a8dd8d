"""From a row of each output to what a client reads: plain JSON data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tldist.runtime.package import LOGITS, PROBABILITIES, PackageConfig
from tldist.runtime.predict import probabilities
from tldist.serve.recipe import ServeRecipe
from tldist.serve.uploads import Refused


@dataclass(frozen=True)
class Wanted:
    """What a request asks for.

    Attributes:
        top: how many classes to name.
        outputs: vectors to give whole, by name.
    """

    top: int
    outputs: tuple[str, ...]


def known_outputs(config: PackageConfig) -> tuple[str, ...]:
    """The vectors that can be asked for; probabilities follow from the logits of a classifier."""
    more = (PROBABILITIES,) if config.classes and PROBABILITIES not in config.outputs else ()
    return (*config.outputs, *more)


def read_query(query: Mapping[str, str], config: PackageConfig, recipe: ServeRecipe) -> Wanted:
    """Read ``?top=5&outputs=logits,features``.

    Raises:
        Refused: 400, for a key or a value that means nothing.
    """
    if unknown := set(query) - {"top", "outputs"}:
        raise Refused(400, f"unknown parameter '{min(unknown)}'; known: top, outputs", close=True)
    top = query.get("top", str(recipe.top))
    if not (top.isascii() and top.isdigit() and 1 <= len(top) <= 6 and int(top) > 0):
        raise Refused(400, "top: expected a whole number of 1 or more", close=True)
    # A feature extractor has nothing else to say, so it gives them all.
    names = query["outputs"].split(",") if "outputs" in query else [] if config.classes else config.outputs
    known = known_outputs(config)
    if any(name not in known for name in names):
        raise Refused(400, f"outputs: expected names among {', '.join(known)}, with commas", close=True)
    return Wanted(int(top), tuple(names))


def describe_answer(row: Mapping[str, np.ndarray], config: PackageConfig, wanted: Wanted) -> dict[str, Any]:
    """What the model says about one image.

    Args:
        row: (D,) of each output, by name.
        config: of the package.
        wanted: what to say.

    Raises:
        ArithmeticError: a value is not finite.
    """
    if not all(np.isfinite(values).all() for values in row.values()):
        raise ArithmeticError("the model gave a value that is not finite")
    found: dict[str, Any] = {}
    vectors = dict(row)
    if config.classes:
        one = {name: values[None] for name, values in row.items() if name in (LOGITS, PROBABILITIES)}
        vectors[PROBABILITIES] = shares = probabilities(one, config.temperature, config.task)[0]
        order = np.argsort(-shares, kind="stable")[: wanted.top]
        top = [{"label": config.classes[at], "probability": float(shares[at])} for at in order]
        found = {**top[0], "top": top}
    return {**found, **{name: vectors[name].tolist() for name in wanted.outputs}}


def describe_package(config: PackageConfig, recipe: ServeRecipe) -> dict[str, Any]:
    """What ``/info`` says: everything about the package but where it and its makers' files lie."""
    profile = {name: config.profile.get(name) for name in ("name", "precision", "provider")}
    return {
        "package": config.identity,
        "classes": list(config.classes),
        "task": config.task,
        "temperature": config.temperature,
        "input": config.input,
        "preprocessing": config.preprocessing.to_dict(),
        "outputs": config.outputs,
        "profile": profile,
        "bundle": config.bundle,
        "files": config.files,
        "versions": config.versions,
        "limits": {
            name: getattr(recipe, name)
            for name in ("max_batch", "queue", "timeout_s", "max_body_mb", "max_images", "max_pixels")
        },
    }
