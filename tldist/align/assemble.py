"""The aligned model: backbone, the transforms that target features pass through, the refitted head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tldist.align.head import Head
from tldist.errors import ModelError
from tldist.features.extract import extract_batch
from tldist.models.chain import Chain, Transform
from tldist.models.description import build_model
from tldist.models.heads import find_head, pool
from tldist.models.load import input_tensor
from tldist.models.weights import Weights, load_into
from tldist.runtime.preprocess import Preprocessing


def assemble(
    model: nn.Module,
    description: Mapping[str, Any],
    transform: Transform | None,
    head: Head,
    *,
    trust_code: bool = False,
) -> tuple[Chain, dict[str, Any]]:
    """Build the chain of a model's backbone, its old transforms, a new one, and a new head.

    Args:
        model: a network, or a chain (which keeps its backbone and its transforms).
        description: of ``model``.
        transform: what the features that ``model``'s head reads pass through now; None: nothing.
        head: reads the transform's output.
        trust_code: allow a description that names code of its own.

    Returns:
        The chain in evaluation mode, on the CPU, in float32, and its description.
    """
    was_chain = description["type"] == "chain"
    old = list(description["transforms"]) if was_chain else []
    new = [transform.describe()] if transform is not None else []
    chained = {
        "type": "chain",
        "backbone": dict(description["backbone"] if was_chain else description),
        "transforms": [*old, *new],
        "head": head.describe(),
    }
    head_path = find_head(model)[0]
    tensors = {
        name if was_chain else f"backbone.{name}": tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(f"{head_path}.")
    }
    if transform is not None:
        tensors |= {f"transforms.{len(old)}.{name}": t for name, t in transform.state_dict().items()}
    tensors |= {f"head.{name}": tensor for name, tensor in head.tensors().items()}
    chain = build_model(chained, trust_code=trust_code)
    assert isinstance(chain, Chain)
    load_into(chain, Weights("the aligned model", tensors))
    return chain.eval(), chained


@torch.no_grad()
def check_assembled(chain: Chain, num_new: int, model: nn.Module, how: Preprocessing, images: Tensor) -> None:
    """Compare the features that reach the chain's new transforms with those that the model's head reads.

    They differ where a model computes more after its head, as a person's own may.

    Args:
        chain: as assembled.
        num_new: how many of its last transforms are new.
        model: what it was assembled from.
        how: the preprocessing of both.
        images: uint8 (N, H, W, 3), where both models are.

    Raises:
        ModelError: they differ.
    """
    expected = extract_batch(model, how, images)
    found = pool(chain.backbone(input_tensor(images, how)))
    for transform in list(chain.transforms)[: len(chain.transforms) - num_new]:
        found = transform(found)
    largest = float(expected.abs().max())
    if found.shape != expected.shape or not float((found - expected).abs().max()) <= 1e-3 * largest:
        raise ModelError(
            f"{type(model).__name__} computes something after its last linear layer, so its head cannot be "
            f"taken off: without it the features are others. Move that out of the model."
        )
