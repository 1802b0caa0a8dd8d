"""The last look at a merged model: are its tensors and its outputs finite numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from tldist.data.loader import load_batches
from tldist.domain import Domain
from tldist.errors import ModelError
from tldist.models.load import input_tensor
from tldist.runtime.preprocess import Preprocessing

_FEW = 8


def probe_images(how: Preprocessing, domain: Domain | None) -> Tensor:
    """Images to try a model on: black, white, noise, and a few real ones where there is a domain.

    Returns:
        uint8 (N, H, W, 3).
    """
    shape = (how.height, how.width, 3)
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    probes = [torch.stack([torch.zeros_like(noise), torch.full_like(noise, 255), noise])]
    if domain is not None:
        few = np.linspace(0, len(domain) - 1, min(_FEW, len(domain))).astype(int)
        batch = next(load_batches(domain, [few], how))
        probes.append(batch.images[batch.valid])
    return torch.cat(probes)


@torch.no_grad()
def check_finite(model: nn.Module, how: Preprocessing, images: Tensor) -> None:
    """Refuse a model with tensors or outputs that are not finite.

    Args:
        model: in evaluation mode.
        how: its preprocessing.
        images: uint8 (N, H, W, 3), on the model's device.

    Raises:
        ModelError: names the tensors, or the first layer whose output is not finite.
    """
    bad = [name for name, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise ModelError(
            f"the merged model is refused: its tensor {bad[0]}{more} holds NaN or infinity. Check the models "
            f"it was made from with tldist evaluate; nothing was written."
        )
    with _first_not_finite(model) as found:
        outputs = model(input_tensor(images, how))
    if not torch.isfinite(outputs).all():
        where = found[0] if found else "its last step"
        raise ModelError(
            f"the merged model is refused: its output is not finite (NaN or infinity), first at {where}. "
            f"Nothing was written."
        )


@contextmanager
def _first_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """While inside, the layers whose output is not finite are noted, in the order of the forward pass."""
    found: list[str] = []

    def note(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and not torch.isfinite(output).all():
                found.append(path)

        return model.get_submodule(path).register_forward_hook(hook)

    paths = [path for path, module in model.named_modules() if path and not list(module.children())]
    handles = [note(path) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
