"""The zoo: architectures by name, and the weights that start them."""

from __future__ import annotations

import importlib
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models as torchvision_models

from tldist.errors import BundleError, ModelError, close_matches
from tldist.runtime.preprocess import Preprocessing

_OPTIONS: dict[str, dict[str, Any]] = {
    # Auxiliary heads serve training from scratch; transform_input is how the published weights were made.
    "googlenet": {"aux_logits": False, "init_weights": False, "transform_input": True},
    "inception_v3": {"aux_logits": False, "init_weights": False, "transform_input": True},
}
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


@dataclass(frozen=True)
class Weights:
    """Tensors to start from, and what is known about them.

    Attributes:
        origin: what they were asked for as, for messages and lineage.
        tensors: by the architecture's own names.
        classes: the names of the head's outputs; empty where unknown.
        preprocessing: how their inputs were made; None where unknown.
    """

    origin: str
    tensors: dict[str, Tensor]
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None


def list_architectures() -> list[str]:
    """Names of torchvision's classification models."""
    return torchvision_models.list_models(module=torchvision_models)


def describe_network(name: str, num_classes: int, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The plain-data description of a network.

    Args:
        name: a torchvision name, or ``package.module:function``.
        num_classes: outputs of its head.
        options: keyword arguments of its constructor.
    """
    source = "code" if ":" in name else "torchvision"
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


def find_weights(name: str, weights: str) -> Weights | None:
    """The weights to start a network from.

    Args:
        name: the architecture.
        weights: ``none``, ``default``, the name of torchvision's enum (``IMAGENET1K_V1``), or a file.

    Raises:
        ModelError: unknown, or they cannot be downloaded.
        BundleError: a file that is damaged, or holds more than weights.
    """
    if weights == "none":
        return None
    if Path(weights).suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return Weights(weights, read_tensors(Path(weights)))
    if ":" in name:
        if weights == "default":
            return None
        raise ModelError(f"weights={weights}: code of your own takes weights=none or a file.")
    return _torchvision_weights(name, weights)


def _torchvision_weights(name: str, weights: str) -> Weights:
    try:
        known = torchvision_models.get_model_weights(name)
    except ValueError:
        raise ModelError(f"unknown model '{name}'. {close_matches(name, list_architectures())}") from None
    wanted = weights.rpartition(".")[2]
    if wanted != "default" and wanted not in known.__members__:
        hint = close_matches(wanted, [*known.__members__, "default", "none"])
        raise ModelError(f"weights={weights}: unknown for {name} and not a file. {hint}")
    entry = known.DEFAULT if wanted == "default" else known[wanted]
    try:
        tensors = entry.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # urllib, ssl and torch.hub raise their own
        raise ModelError(
            f"the weights {entry} of {name} cannot be downloaded ({error}). Give a file with "
            f"weights=FILE.safetensors, or start from random weights with weights=none."
        ) from error
    preset = entry.transforms()
    crop, resize = preset.crop_size[0], preset.resize_size[0]
    preprocessing = Preprocessing(
        crop, crop, resize, preset.interpolation.value, tuple(preset.mean), tuple(preset.std)
    )
    return Weights(str(entry), dict(tensors), tuple(entry.meta["categories"]), preprocessing)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a weights file: safetensors, or a ``.pth`` that holds nothing but tensors.

    Raises:
        BundleError: missing, damaged, or a pickle that would run code.
    """
    if not path.is_file():
        raise BundleError(f"{path}: no such weights file.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise BundleError(f"{path}: damaged or truncated safetensors: {error}.") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BundleError(
            f"{path}: is more than weights, or damaged: it cannot be read without running code from it. "
            f"Save it again as safetensors where you trust it."
        ) from error
    for wrapper in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise BundleError(f"{path}: expected a mapping of names to tensors, found {type(loaded).__name__}.")
    return {str(name).removeprefix("module."): tensor for name, tensor in loaded.items()}


def load_into(model: nn.Module, weights: Weights, skip: str = "") -> None:
    """Load tensors by name; every tensor outside ``skip`` must be there and fit.

    Args:
        model: the network.
        weights: the tensors.
        skip: path of a module to leave as it is (a replaced head).

    Raises:
        ModelError: names or shapes differ: the weights of another architecture.
    """
    expected = model.state_dict()
    prefix = f"{skip}." if skip else "\0"
    given = {name: t for name, t in weights.tensors.items() if not name.startswith((prefix, *_AUXILIARY))}
    wanted = {name for name in expected if not name.startswith(prefix)}
    missing = sorted(name for name in wanted - given.keys() if not name.endswith("num_batches_tracked"))
    unexpected = sorted(given.keys() - expected.keys())
    wrong = [
        f"{name} {tuple(given[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(wanted & given.keys())
        if given[name].shape != expected[name].shape
    ]
    if missing or unexpected or wrong:
        details = [
            f"{label}: {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
            for label, names in (("missing", missing), ("unknown", unexpected), ("other shape", wrong))
            if names
        ]
        raise ModelError(
            f"{weights.origin}: not the weights of {type(model).__name__} ({'; '.join(details)})."
        )
    state = OrderedDict(given)
    state._metadata = expected._metadata  # type: ignore[attr-defined]  # MNASNet wants its version beside them
    model.load_state_dict(state, strict=False)
