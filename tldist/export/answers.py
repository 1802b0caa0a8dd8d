"""PyTorch's answers to samples, images of one size at a time. Needs torch."""

from __future__ import annotations

import copy

import numpy as np

from tldist.export.graph import ExportGraph, run_graph
from tldist.progress import warn
from tldist.runtime.reference import Reference, Samples


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


def _run(graph: ExportGraph, samples: Samples) -> dict[str, np.ndarray]:
    """(N, D) of each output; images of one size run together, and their rows go back to their places."""
    parts = [(rows, run_graph(graph, images)) for rows, images in samples.by_size()]
    order = np.argsort(np.concatenate([rows for rows, _ in parts]))
    return {name: np.concatenate([found[name] for _, found in parts])[order] for name in graph.outputs}
