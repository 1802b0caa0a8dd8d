"""From a description (plain data) to the module that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tldist.errors import BundleError
from tldist.models.chain import Chain, build_transform
from tldist.models.zoo import build_network


def build_model(description: Mapping[str, Any], *, trust_code: bool = False) -> nn.Module:
    """Build the module of a description, with initial weights.

    Args:
        description: ``{"type": "network", ...}`` or ``{"type": "chain", ...}``.
        trust_code: allow a description that names code of its own.

    Raises:
        BundleError: the description is malformed or of an unknown type.
        ModelError: the architecture is unknown.
    """
    try:
        kind = description["type"]
        if kind == "network":
            return build_network(description, trust_code=trust_code)
        if kind == "chain":
            backbone = build_network(description["backbone"], trust_code=trust_code)
            transforms = [build_transform(part) for part in description["transforms"]]
            head = description["head"]
            return Chain(backbone, transforms, nn.Linear(int(head["in"]), int(head["out"])))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"malformed model description: {type(error).__name__}: {error}.") from error
    raise BundleError(f"model description of unknown type '{kind}' (known: network, chain).")


def num_outputs(description: Mapping[str, Any]) -> int:
    """Number of outputs of the described model."""
    if description["type"] == "chain":
        return int(description["head"]["out"])
    return int(description["num_classes"])


def with_outputs(description: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """The same model with another number of outputs."""
    if description["type"] == "chain":
        return {**description, "head": {**description["head"], "out": num_classes}}
    return {**description, "num_classes": num_classes}


def architecture_name(description: Mapping[str, Any]) -> str:
    """A short name for people."""
    if description["type"] == "chain":
        parts = [part["type"] for part in description["transforms"]]
        return " -> ".join([description["backbone"]["name"], *parts, "linear"])
    return str(description["name"])
