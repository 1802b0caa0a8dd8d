"""One module from the tensors of several bundles."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tldist.fuse.methods import Method, Settings, model_shares
from tldist.fuse.parents import Parent, open_tensors
from tldist.fuse.policy import merge_tensor
from tldist.models.description import build_model
from tldist.models.heads import find_head
from tldist.models.weights import Weights, load_into


def merge_models(
    parents: Sequence[Parent],
    base: Parent | None,
    method: Method,
    settings: Settings,
    *,
    trust_code: bool = False,
) -> nn.Module:
    """Merge bundles tensor by tensor; no parent is in memory as a whole.

    Args:
        parents: of one architecture; the first one's class order is the result's.
        base: the model that they were fine-tuned from, if the method uses it.
        method: how learned numbers are merged.
        settings: what the method is told.
        trust_code: allow a description that names code of its own.

    Returns:
        The merged model in evaluation mode, on the CPU.

    Raises:
        BundleError: the files do not hold the same tensors.
    """
    model = build_model(parents[0].config.model, trust_code=trust_code)
    shares = model_shares(method, settings, base is not None)
    everyone = [base, *parents] if base is not None else list(parents)
    first = 0 if base is None else 1
    with open_tensors(everyone, reference=parents[0], head=find_head(model)[0]) as tensors:
        merged = {
            name: merge_tensor(
                name,
                tensors.names,
                tensors.read,
                shares,
                lambda wide: method.merge(wide[first:], wide[0] if first else None, settings),
            )
            for name in tensors.names
        }
    load_into(model, Weights("the merged model", merged))
    return model.eval()
