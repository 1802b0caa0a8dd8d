"""PyTorch's answers for a graph that takes whole pictures: its resize and its network, each by itself.

The graph is held to PyTorch on the very pixels that it makes of a picture, at the profile's tolerances; those
pixels are held to the ones that training makes, to one grey level of 255. So no tolerance of the network has
to hide what a rounded grey level does to its answers. Needs torch.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from tldist.errors import PackageError
from tldist.export.agreement import Resize
from tldist.export.answers import answer
from tldist.export.graph import ExportGraph
from tldist.export.onnx_values import LEVELS, Graph, run_values
from tldist.export.picture import FITTED
from tldist.runtime.preprocess import fit
from tldist.runtime.reference import Reference, Samples
from tldist.runtime.session import CPU


def answer_pictures(
    graph: ExportGraph, model: Path, samples: Samples, provider: str = CPU
) -> tuple[Reference, Resize, np.ndarray]:
    """PyTorch's answers to whole pictures, and how the package resizes them.

    Args:
        graph: the network: it takes images of the size that the preprocessing makes.
        model: the ``.onnx`` file, which takes pictures.
        samples: pictures of any size.
        provider: that runs the resize where it is deployed.

    Returns:
        The reference (``fitted`` is for the package to carry: a comparison with PyTorch needs no allowance);
        the resize; and the graph's pixels, uint8 (N, H, W, 3).

    Raises:
        PackageError: the graph has no resize inside, or one to another size.
    """
    pixels = fitted_pixels(model, samples, provider)
    pictures = [*samples.images, *samples.pictures]
    trained = np.stack([fit(Image.fromarray(picture), graph.how) for picture in pictures])
    if pixels.shape != trained.shape:
        raise PackageError(f"{model}: resizes pictures to {pixels.shape}, training to {trained.shape}.")
    gap = np.abs(pixels.astype(np.int16) - trained)
    reference = answer(graph, Samples(pixels, samples.groups, samples.ids))
    fitted = answer(graph, Samples(trained, samples.groups, samples.ids), referee=False).expected
    resize = Resize(len(pixels), int(gap.max()), float(gap.mean()), float((gap > 0).mean()))
    return Reference(samples, reference.expected, reference.referee, fitted=fitted), resize, pixels


def fitted_pixels(model: Path, samples: Samples, provider: str) -> np.ndarray:
    """uint8 (N, H, W, 3): what the package's graph makes of pictures before its network sees them."""
    package = Graph.open(model)
    if FITTED not in package.values():
        raise PackageError(f"{model}: has no value '{FITTED}', so that its resize cannot be compared.")
    return samples.collect(
        lambda images: {FITTED: run_values(package, [FITTED], images, LEVELS[-1], provider)[FITTED]}
    )[FITTED]
