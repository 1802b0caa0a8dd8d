"""The zoo: architectures by name, as descriptions and as modules."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torchvision import models as torchvision_models

from tldist.errors import ModelError, close_matches
from tldist.models import timm_zoo

_OPTIONS: dict[str, dict[str, Any]] = {
    # Auxiliary heads serve training from scratch; transform_input is how the published weights were made.
    "googlenet": {"aux_logits": False, "init_weights": False, "transform_input": True},
    "inception_v3": {"aux_logits": False, "init_weights": False, "transform_input": True},
}


def list_architectures() -> list[str]:
    """Names of torchvision's classification models."""
    return torchvision_models.list_models(module=torchvision_models)


def describe_network(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The plain-data description of a network.

    Args:
        name: a torchvision name, ``timm/NAME``, or ``package.module:function``.
        num_classes: outputs of its head.
        options: keyword arguments of its constructor.
    """
    source = "timm" if timm_zoo.owns(name) else "code" if ":" in name else "torchvision"
    chosen = {**_OPTIONS.get(name, {}), **(options or {})}
    return {"type": "network", "source": source, "name": name, "num_classes": num_classes, "options": chosen}


def build_network(description: Mapping[str, Any], *, trust_code: bool) -> nn.Module:
    """Build a network with its initial weights.

    Raises:
        ModelError: the name is unknown, or it is code and ``trust_code`` is false.
    """
    name, options = description["name"], dict(description.get("options", {}))
    num_classes = int(description["num_classes"])
    if description.get("source") == "code":
        if not trust_code:
            raise ModelError(f"the bundle names code of its own ({name}); trust_code=true runs it.")
        return _call_code(name, num_classes, options)
    if timm_zoo.owns(name):
        return timm_zoo.build(name, num_classes, options)
    if name not in list_architectures():
        raise ModelError(f"unknown model '{name}'. {close_matches(name, list_architectures())}")
    model: nn.Module = torchvision_models.get_model(name, weights=None, num_classes=num_classes, **options)
    return model


def _call_code(name: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ModelError(f"model={name}: cannot be imported: {error}.") from error
    if "num_classes" not in inspect.signature(function).parameters:
        raise ModelError(f"model={name}: expected a function with a num_classes argument.")
    model = function(num_classes=num_classes, **options)
    if not isinstance(model, nn.Module):
        raise ModelError(f"model={name}: returned {type(model).__name__}, expected a torch.nn.Module.")
    return model
