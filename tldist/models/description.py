"""From a description (plain data) to the module that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tldist.bundle import Task
from tldist.errors import BundleError
from tldist.models.chain import Chain, build_transform
from tldist.models.composite import Concat, Ensemble
from tldist.models.composite_layout import COMPOSITES, ConcatLayout, EnsembleLayout, input_of, read_layout
from tldist.models.heads import no_single_head
from tldist.models.neighbours import build_head
from tldist.models.zoo import build_network
from tldist.runtime.preprocess import Preprocessing

_DEEPEST = 8
"""Composites within composites, at most."""


def build_model(description: Mapping[str, Any], *, trust_code: bool = False) -> nn.Module:
    """Build the module of a description, with initial weights.

    Args:
        description: ``{"type": "network", ...}``, ``{"type": "chain", ...}`` or a composite
            (`tldist.models.composite_layout`).
        trust_code: allow a description that names code of its own.

    Raises:
        BundleError: the description is malformed or of an unknown type.
        ModelError: the architecture is unknown.
    """
    try:
        return _build(description, trust_code, 0)
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"malformed model description: {type(error).__name__}: {error}.") from error


def _build(description: Mapping[str, Any], trust_code: bool, depth: int) -> nn.Module:
    kind = description["type"]
    if depth > _DEEPEST:
        raise BundleError(f"malformed model description: composites nested more than {_DEEPEST} deep.")
    if kind == "network":
        return build_network(description, trust_code=trust_code)
    if kind == "chain":
        inner = {"type": "network", **description["backbone"]}
        if inner["type"] not in ("network", "concat"):
            raise BundleError(f"a chain on a backbone of type '{inner['type']}' (known: network, concat).")
        backbone = _build(inner, trust_code, depth + 1)
        transforms = [build_transform(part) for part in description["transforms"]]
        return Chain(backbone, transforms, build_head(description["head"]))
    if kind == "ensemble":
        votes = read_layout(EnsembleLayout, description)
        return Ensemble(votes, [_build(member.model, trust_code, depth + 1) for member in votes.members])
    if kind == "concat":
        joined = read_layout(ConcatLayout, description)
        return Concat(joined, [_build(member.model, trust_code, depth + 1) for member in joined.members])
    raise BundleError(
        f"model description of unknown type '{kind}' (known: network, chain, {', '.join(COMPOSITES)})."
    )


def num_outputs(description: Mapping[str, Any]) -> int:
    """Number of outputs of the described model."""
    if description["type"] == "ensemble":
        return len(description["members"][0]["rows"])
    if description["type"] in ("chain", "concat"):
        return int(description["head"]["out"])
    return int(description["num_classes"])


def with_outputs(description: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """The same model with another number of outputs.

    Raises:
        ModelError: an ensemble, which has no head of its own.
    """
    if description["type"] == "ensemble":
        raise no_single_head()
    if description["type"] in ("chain", "concat"):
        width = description["head"]["in"]  # a head of neighbours becomes a linear one, which can be trained
        return {**description, "head": {"type": "linear", "in": width, "out": num_classes}}
    return {**description, "num_classes": num_classes}


def with_image_size(description: Mapping[str, Any], size: int) -> dict[str, Any]:
    """The same model for square images of another size: a composite resizes for its members."""
    if input_of(description) is None:
        return dict(description)
    if description["type"] == "chain":
        return {**description, "backbone": with_image_size(description["backbone"], size)}
    return {**description, "input": {**description["input"], "height": size, "width": size}}


def check_described(description: Mapping[str, Any], how: Preprocessing, task: Task) -> None:
    """Check a composite's description, which says what it takes and answers, against the rest of its bundle.

    Raises:
        BundleError: the preprocessing makes another input, or the task is another.
    """
    own = input_of(description)
    given = {name: value for name, value in how.to_dict().items() if name in (own or {})}
    if own is not None and own != given:
        raise BundleError(f"the composite takes {own}, and the bundle's preprocessing makes {given}.")
    if description.get("type") == "ensemble" and description["task"] != task:
        raise BundleError(f"the ensemble is {description['task']}, and the bundle says {task}.")


def architecture_name(description: Mapping[str, Any]) -> str:
    """A short name for people."""
    kind = description["type"]
    if kind == "ensemble":
        members = ", ".join(architecture_name(member["model"]) for member in description["members"])
        return f"ensemble ({members}) by {description['combine']}"
    if kind == "concat":
        first = " + ".join(_backbone_name(member["model"]) for member in description["members"])
    elif kind == "chain":
        first = _backbone_name(description["backbone"])
    else:
        return str(description["name"])
    parts = [part["type"] for part in description["transforms"]]
    return " -> ".join([first, *parts, description["head"].get("type", "linear")])


def _backbone_name(description: Mapping[str, Any]) -> str:
    """Of a model whose head is taken off."""
    name = architecture_name({"type": "network", **description})
    bare = name.removesuffix(" -> linear").removesuffix(" -> neighbours")
    return f"({bare})" if " " in name else name
