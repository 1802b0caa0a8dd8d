"""The linear and convolution layers that answer ``weight * input + bias``, and why others do not count."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from tldist.progress import warn

Plain = nn.Linear | nn.Conv2d

UNCALLED = "its weight is read without a call of the layer"


@dataclass(frozen=True)
class PlainLayers:
    """Layers of a model.

    Attributes:
        found: by path.
        left_out: linear and convolution layers of another kind: path to reason.
    """

    found: dict[str, Plain]
    left_out: dict[str, str]


def plain_layers(model: nn.Module) -> PlainLayers:
    """The Linear and Conv2d layers whose output is linear in their own weight tensor.

    Left out are subclasses with a forward of their own (padding that follows the input, a standardised
    weight), weights that are computed from others, and weights that two modules share.
    """
    owners = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    layers = {path: module for path, module in model.named_modules() if isinstance(module, Plain)}
    reasons = {path: _why_not(layer, owners) for path, layer in layers.items()}
    return PlainLayers(
        {path: layer for path, layer in layers.items() if reasons[path] is None},
        {path: reason for path, reason in reasons.items() if reason is not None},
    )


def _why_not(layer: Plain, owners: Mapping[int, int]) -> str | None:
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    own = [
        getattr(type(layer), step) is not getattr(kind, step)
        for step in ("forward", "_conv_forward")
        if hasattr(kind, step)
    ]
    if any(own) or "forward" in vars(layer):
        return f"{type(layer).__name__} has a forward of its own"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors"
    if owners[id(weight)] > 1:
        return "its weight is shared with another layer"
    return None


def report_left_out(what: str, left_out: Mapping[str, str]) -> None:
    """Warn of what is left out, a line a reason."""
    by_reason: dict[str, list[str]] = defaultdict(list)
    for name, reason in left_out.items():
        by_reason[reason].append(name)
    for reason, names in by_reason.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warn(f"{what} leaves out {names[0]}{more}: {reason}")
