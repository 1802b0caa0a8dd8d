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
    expected = samples.collect(lambda images: run_graph(graph, images))
    exact: dict[str, np.ndarray] = {}
    if referee:
        try:
            double = copy.deepcopy(graph).double()
            exact = samples.collect(lambda images: run_graph(double, images))
        except RuntimeError as error:  # code of one's own may insist on float32
            reason = str(error).splitlines()[0]
            warn(f"the model does not run in float64, so parity has no referee: {reason}")
    return Reference(samples, {name: values.astype(np.float32) for name, values in expected.items()}, exact)
