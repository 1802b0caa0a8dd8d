"""Weights to start from: published ones by name, files, folders; read without running code."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models as torchvision_models

from tldist.errors import BundleError, ModelError, close_matches
from tldist.models import timm_zoo
from tldist.models.zoo import list_architectures
from tldist.runtime.preprocess import Preprocessing

_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
"""Heads of googlenet and inception that only training from scratch uses."""
_HUB = "hf://"


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


def find_weights(name: str, weights: str) -> Weights | None:
    """The weights to start a network from.

    Args:
        name: the architecture.
        weights: ``none``, ``default``, the name of torchvision's enum (``IMAGENET1K_V1``), a file, or
            ``hf://OWNER/REPOSITORY[@REVISION][/FILE]``.

    Raises:
        ModelError: unknown, or they cannot be downloaded.
        BundleError: a file that is damaged, or holds more than weights.
    """
    if weights == "none":
        return None
    if weights.startswith(_HUB):
        return Weights(weights, read_tensors(_download(weights)))
    if Path(weights).suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return Weights(weights, read_tensors(Path(weights)))
    if timm_zoo.owns(name):
        if weights != "default":
            raise ModelError(f"weights={weights}: {name} takes default, none, hf:// or a file.")
        return Weights(name, *timm_zoo.published(name))
    if ":" in name:
        if weights == "default":
            return None
        raise ModelError(f"weights={weights}: code of your own takes weights=none or a file.")
    return _torchvision_weights(name, weights)


def _download(uri: str) -> Path:
    """Fetch one file of a repository of the Hugging Face hub (HF_ENDPOINT, HF_HOME and tokens count)."""
    from huggingface_hub import hf_hub_download

    parts = uri.removeprefix(_HUB).split("/")
    if len(parts) < 2 or not all(parts):
        raise ModelError(f"weights={uri}: expected hf://OWNER/REPOSITORY[@REVISION][/FILE].")
    repository, _, revision = parts[1].partition("@")
    file = "/".join(parts[2:]) or "model.safetensors"
    try:
        return Path(hf_hub_download(f"{parts[0]}/{repository}", file, revision=revision or None))
    except Exception as error:  # the hub's client raises its own, requests' and OSError
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"weights={uri}: cannot be fetched: {reason}") from error


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
