"""From a name or a folder to a module with weights, and back to a bundle."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tldist.bundle import WEIGHTS, BundleConfig, is_bundle, parent_record, read_bundle, write_bundle
from tldist.distributed import whole
from tldist.errors import BundleError, ModelError
from tldist.models import timm_zoo
from tldist.models.description import build_model, check_described, num_outputs, with_image_size, with_outputs
from tldist.models.heads import copy_rows_by_name, find_head, num_logits
from tldist.models.weights import Weights, find_weights, load_into, read_tensors
from tldist.models.zoo import build_network, describe_network
from tldist.runtime.preprocess import Preprocessing


def load_bundle(
    path: str | os.PathLike[str], *, trust_code: bool = False, verify: bool = True
) -> tuple[nn.Module, BundleConfig]:
    """Rebuild a bundle's module with its weights, in evaluation mode, on the CPU.

    Args:
        path: a bundle, or a run that holds one.
        trust_code: allow a bundle that names code of its own.
        verify: compare every file's SHA-256 with the one recorded.

    Raises:
        BundleError: not a bundle, damaged, or its weights do not fit its description.
    """
    folder, config = read_bundle(path, verify=verify)
    model = build_model(config.model, trust_code=trust_code)
    check_described(config.model, config.preprocessing, config.task)
    tensors = read_tensors(folder / WEIGHTS)
    try:
        load_into(model, Weights(str(folder / WEIGHTS), tensors))
    except ModelError as error:
        raise BundleError(f"{folder}: weights and description do not belong together: {error}") from error
    return model.eval(), config


def save_bundle(path: str | os.PathLike[str], model: nn.Module, config: BundleConfig) -> BundleConfig:
    """Write a model as a bundle; returns the configuration with the hashes of its files.

    Raises:
        BundleError: a composite whose description says another input or task.
    """
    check_described(config.model, config.preprocessing, config.task)
    return write_bundle(path, config, lambda file: save_tensors(model.state_dict(), file))


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write tensors as safetensors: contiguous, on the CPU, each with its own memory."""
    seen: set[int] = set()
    ready: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        shares = plain.untyped_storage().data_ptr() in seen  # tied weights: safetensors wants a copy
        ready[name] = plain.clone() if shares else plain
        seen.add(ready[name].untyped_storage().data_ptr())
    save_file(ready, file, metadata={"format": "pt"})


def hash_tensors(state: Mapping[str, Tensor], names: Iterable[str] | None = None) -> str:
    """SHA-256 over tensors, with their names, shapes and dtypes; of the named ones, or of all."""
    digest = hashlib.sha256()
    for name in sorted(state if names is None else names):
        tensor = whole(state[name].detach()).cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Start:
    """A model ready to be trained, and where it came from.

    Attributes:
        model: the module, with its head for the wanted classes.
        config: its description, classes and preprocessing.
        known_rows: rows of the head that were taken over by class name.
    """

    model: nn.Module
    config: BundleConfig
    known_rows: int


def start_model(
    model: str,
    weights: str,
    classes: tuple[str, ...],
    *,
    image_size: int | None = None,
    new_head: bool = False,
    trust_code: bool = False,
) -> Start:
    """Build a model for a task: an architecture with weights, or a bundle, with a head for ``classes``.

    Args:
        model: torchvision name, ``timm/NAME``, ``package.module:function``, or a bundle (folder or run).
        weights: ``default`` (the best pre-trained ones, or the bundle's own), ``none``, a name or a file.
        classes: what the head shall answer.
        image_size: pixels of the square input; None: what the weights were made with.
        new_head: initialise the whole head afresh, even for classes that the model knows.
        trust_code: allow a bundle that names code of its own.

    Raises:
        ModelError, BundleError: see `find_weights` and `load_bundle`.
    """
    if names_folder(model):
        start = _start_from_bundle(model, weights, classes, image_size, new_head, trust_code)
    else:
        start = _start_from_name(model, weights, classes, image_size, new_head)
    return start if image_size is None else _with_image_size(start, image_size)


def names_folder(model: str) -> bool:
    """Whether ``model=`` means a bundle or a run on disk, not the name of an architecture."""
    return not timm_zoo.owns(model) and (Path(model).is_dir() or os.sep in model or is_bundle(model))


def _start_from_name(
    name: str, weights: str, classes: tuple[str, ...], image_size: int | None, new_head: bool
) -> Start:
    options: dict[str, Any] = {}
    if name.startswith("vit_") and image_size:
        options["image_size"] = image_size  # a ViT's position embedding fixes it
    description = describe_network(name, len(classes), options)
    found = find_weights(name, weights)
    model = build_network(description, trust_code=True)  # named by the person at the keyboard
    rows = _take_over(model, found, classes, new_head) if found else 0
    known = found.preprocessing if found else None
    if known is None and timm_zoo.owns(name):
        known = timm_zoo.preprocessing_of(model)
    preprocessing = known or Preprocessing()
    lineage = {"weights": found.origin if found else "none"}
    return Start(model, BundleConfig(description, classes, preprocessing, lineage), rows)


def _start_from_bundle(
    path: str,
    weights: str,
    classes: tuple[str, ...],
    image_size: int | None,
    new_head: bool,
    trust_code: bool,
) -> Start:
    folder, config = read_bundle(path)
    description = with_outputs(config.model, len(classes))
    if image_size is not None:
        description = with_image_size(description, image_size)
    model = build_model(description, trust_code=trust_code)
    rows = 0
    if weights == "default":
        own = Weights(str(folder), read_tensors(folder / WEIGHTS), config.classes)
        rows = _take_over(model, own, classes, new_head)
    elif weights != "none":
        rows = _take_over(model, Weights(weights, read_tensors(Path(weights))), classes, new_head)
    parents = [parent_record(folder, config)] if weights == "default" else []
    lineage = {"weights": weights if weights != "default" else str(folder), "parents": parents}
    return Start(model, BundleConfig(description, classes, config.preprocessing, lineage), rows)


def _take_over(model: nn.Module, weights: Weights, classes: tuple[str, ...], new_head: bool) -> int:
    """Load all but the head, then the head's rows of the classes that the weights know by name."""
    path, head = find_head(model)
    load_into(model, weights, skip=path)
    weight, bias = weights.tensors.get(f"{path}.weight"), weights.tensors.get(f"{path}.bias")
    if new_head or weight is None or not weights.classes or weight.shape[0] != len(weights.classes):
        return 0
    if weight.shape[1:] != head.weight.shape[1:]:
        return 0
    return copy_rows_by_name(head, weight, bias, weights.classes, classes)


def _with_image_size(start: Start, size: int) -> Start:
    before = start.config.preprocessing
    resize = max(size, round(before.resize * size / before.height))
    changed = replace(before, height=size, width=size, resize=resize)
    return replace(start, config=replace(start.config, preprocessing=changed))


def input_tensor(
    images: Tensor,
    preprocessing: Preprocessing,
    memory_format: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 images (N, H, W, 3) to the model's float input (N, 3, H, W), on the images' device."""
    scaled = images.permute(0, 3, 1, 2).to(dtype, memory_format=memory_format) / 255
    mean = torch.tensor(preprocessing.mean, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, dtype=dtype, device=images.device).view(1, 3, 1, 1)
    return ((scaled - mean) / std).contiguous(memory_format=memory_format)


def check_outputs(model: nn.Module, config: BundleConfig) -> None:
    """`BundleError` where head, description and class names disagree."""
    outputs = num_logits(model)
    if config.classes and not outputs == len(config.classes) == num_outputs(config.model):
        raise BundleError(f"the head has {outputs} outputs for {len(config.classes)} class names.")
