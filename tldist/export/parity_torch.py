"""The part of ``tldist parity`` that asks PyTorch: a bundle's answers, and what training makes of files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tldist.bundle import BundleConfig
from tldist.domain import DataRecipe
from tldist.errors import PackageError
from tldist.export.agreement import Resize
from tldist.export.answers import answer
from tldist.export.graph import ExportGraph, load_graph
from tldist.export.samples import gather_samples
from tldist.export.skew import find_skew
from tldist.export.whole import answer_pictures
from tldist.progress import say
from tldist.runtime.package import MODEL, PackageConfig
from tldist.runtime.reference import Reference, Samples

MOST_IMAGES = 64
"""Pictures of a domain that are compared where data.limit says nothing."""
_MEAN_LEVELS = 1.0
"""Grey levels by which the pixels of a file may differ in the mean where the graph resizes: training may
decode a large JPEG at a fraction of its size, from which the proportions are rounded otherwise."""


@dataclass(frozen=True)
class Asked:
    """What PyTorch said.

    Attributes:
        graph: the bundle's module, as it was exported.
        reference: its answers; None where nothing can be compared.
        resize: how the package's graph resizes, where it does.
        files: how many files went through training's pipeline and through serving's.
        problems: that came up on the way.
    """

    graph: ExportGraph
    reference: Reference | None
    resize: Resize | None = None
    files: int = 0
    problems: tuple[str, ...] = ()


def ask_pytorch(
    path: Path,
    bundle: BundleConfig,
    folder: Path,
    config: PackageConfig,
    provider: str,
    *,
    data: DataRecipe | None,
    stored: Samples | None,
    trust_code: bool,
) -> Asked:
    """A bundle's answers to a domain's images, else to those stored in the package, else to generated ones.

    Args:
        path: of the bundle.
        bundle: what it is.
        folder: of the package.
        config: what it is.
        provider: that runs the package.
        data: the domain.
        stored: in the package.
        trust_code: run code that the bundle names.
    """
    graph, _ = load_graph(
        path,
        tuple(config.outputs),
        **config.features,
        input=config.input,
        trust_code=trust_code,
        verify=False,
    )
    how, count = bundle.preprocessing, (data.limit if data else None) or MOST_IMAGES
    fits = stored is not None and stored.images.shape[1:] == (how.height, how.width, 3)
    samples = stored if stored and fits and data is None else gather_samples(data, count, how, config.input)
    say(f"asking PyTorch about {len(samples)} images, in float32 and float64")
    if config.input != "picture":
        asked = Asked(graph, answer(graph, samples))
        pixels = samples.images
    else:
        try:
            reference, resize, pixels = answer_pictures(graph, folder / MODEL, samples, provider)
        except PackageError as error:
            return Asked(graph, None, problems=(str(error),))
        asked = Asked(graph, replace(reference, fitted={}), resize)
    if data is None:
        return asked
    files, problems = find_skew(data, count, how, _real(samples, pixels), _allowed(config))
    return replace(asked, files=files, problems=tuple(problems))


def _real(samples: Samples, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """What serving makes of the files of a domain, by id: ``pixels`` are uint8 (N, H, W, 3)."""
    name, count = samples.groups[0]
    assert name == "real"  # they were gathered from a domain
    return dict(zip(samples.ids[:count], pixels[:count]))


def _allowed(config: PackageConfig) -> float:
    return _MEAN_LEVELS if config.input == "picture" else 0.0
