"""PyTorch's answers to samples, images of one size at a time. Needs torch."""

from __future__ import annotations

import copy

import numpy as np
import torch

from tldist.export.converter import ExportGraph
from tldist.progress import warn
from tldist.runtime.reference import Reference, Samples

_BATCH = 16


def answer(graph: ExportGraph, samples: Samples, *, referee: bool = True) -> Reference:
    """PyTorch's answers to samples.

    Args:
        graph: the module, in evaluation mode.
        samples: of any sizes that it takes.
        referee: ask in float64 too.
    """
    expected = _run(graph, samples)
    exact: dict[str, np.ndarray] = {}
    if referee:
        try:
            exact = _run(copy.deepcopy(graph).double(), samples)
        except RuntimeError as error:  # code of one's own may insist on float32
            reason = str(error).splitlines()[0]
            warn(f"the model does not run in float64, so parity has no referee: {reason}")
    return Reference(samples, {name: values.astype(np.float32) for name, values in expected.items()}, exact)


@torch.no_grad()
def _run(graph: ExportGraph, samples: Samples) -> dict[str, np.ndarray]:
    """(N, D) of each output; images of one size run together, and their rows go back to their places."""
    rows, parts = [], []
    for places, images in samples.by_size():
        rows.append(places)
        parts += [graph(torch.from_numpy(images[at : at + _BATCH])) for at in range(0, len(images), _BATCH)]
    order = np.argsort(np.concatenate(rows))
    outputs = enumerate(graph.outputs)
    return {name: torch.cat([part[i] for part in parts]).numpy()[order] for i, name in outputs}
