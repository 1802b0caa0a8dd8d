"""The module that is exported: uint8 images to the outputs asked for; and its answers to samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tldist.bundle import BundleConfig, Task
from tldist.errors import ModelError
from tldist.models.heads import Head, tapped
from tldist.models.load import input_tensor, load_bundle
from tldist.models.taps import find_taps, pool_features, tapped_layers, unit_length
from tldist.models.view import View
from tldist.runtime.package import FEATURES, LOGITS, PROBABILITIES, Input
from tldist.runtime.preprocess import Preprocessing

INNER = f"{FEATURES}."
"""What stands before the name of an inner layer in the name of its output."""

_BATCH = 16


class ExportGraph(nn.Module):
    """What is exported: uint8 images to the asked-for outputs, normalisation inside.

    Args:
        model: normalised images to logits; in evaluation mode.
        how: its preprocessing.
        outputs: names, in order: ``logits``, ``probabilities``, ``features`` (what the head reads),
            ``features.LAYER`` (what an inner layer gives).
        temperature: of the probabilities.
        task: whose probabilities they are.
        pool: how features that have positions become one vector, a name of `tldist.models.taps.POOLS`.
        l2: whether each vector of features is divided by its length.
        input: what the exported graph takes. Resizing whole pictures is no part of this module: it takes
            what `tldist.runtime.preprocess.fit` makes of them.

    Raises:
        ModelError: an output names a layer that is not there, or that has no features.
    """

    def __init__(
        self,
        model: nn.Module,
        how: Preprocessing,
        outputs: Sequence[str],
        temperature: float = 1.0,
        task: Task = "multiclass",
        *,
        pool: str = "mean",
        l2: bool = False,
        input: Input = "fixed",  # noqa: A002 - the recipe's word
    ) -> None:
        super().__init__()
        self.model, self.how, self.outputs = model, how, tuple(outputs)
        self.temperature, self.task = temperature, task
        self.pool, self.l2, self.input = pool, l2, input
        layers = [name.removeprefix(INNER) for name in outputs if name.startswith(INNER)]
        self.taps = find_taps(model, layers, self._normal(self.example())) if layers else ()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 (N, H, W, 3) to one (N, D) an output, in the precision of the weights."""
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            inner = stack.enter_context(tapped_layers(self.model, self.taps, self.pool))
            read = stack.enter_context(tapped(self.model, self._reduce)) if FEATURES in self.outputs else None
            logits = self.model(self._normal(images))
            found |= {INNER + path: self._scaled(values) for path, values in inner().items()}
            if read:
                found[FEATURES] = self._scaled(read())
        tempered = logits / self.temperature
        found[LOGITS] = logits
        found[PROBABILITIES] = tempered.sigmoid() if self.task == "multilabel" else tempered.softmax(1)
        return tuple(found[name] for name in self.outputs)

    def example(self, count: int = 2) -> Tensor:
        """Black images of the size that the preprocessing makes: uint8 (count, H, W, 3)."""
        return torch.zeros(count, self.how.height, self.how.width, 3, dtype=torch.uint8)

    def widths(self) -> tuple[int, ...]:
        """Of the outputs."""
        return tuple(values.shape[1] for values in run_graph(self, self.example(1).numpy()).values())

    def _normal(self, images: Tensor) -> Tensor:
        return input_tensor(images, self.how, dtype=next(self.model.parameters()).dtype)

    def _reduce(self, values: Tensor, head: Head) -> Tensor:
        return pool_features(values, 1 if isinstance(head, nn.Conv2d) else -1, self.pool)

    def _scaled(self, features: Tensor) -> Tensor:
        return unit_length(features) if self.l2 else features


def load_graph(
    path: Path,
    outputs: Sequence[str],
    *,
    pool: str = "mean",
    l2: bool = False,
    input: Input = "fixed",  # noqa: A002 - the recipe's word
    trust_code: bool = False,
    verify: bool = True,
) -> tuple[ExportGraph, BundleConfig]:
    """The module to export of a bundle, in evaluation mode, and the bundle's configuration.

    Raises:
        BundleError: not a bundle, or damaged.
        ModelError: an output that the model cannot give.
    """
    model, config = load_bundle(path, trust_code=trust_code, verify=verify)
    graph = ExportGraph(
        model,
        config.preprocessing,
        outputs,
        config.temperature,
        config.task,
        pool=pool,
        l2=l2,
        input=input,
    )
    return graph.eval(), config


@torch.no_grad()
def run_graph(graph: ExportGraph, images: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 images (N, H, W, 3) to (N, D) of each output, by name."""
    parts = [graph(torch.from_numpy(images[at : at + _BATCH])) for at in range(0, len(images), _BATCH)]
    return {name: torch.cat([part[i] for part in parts]).numpy() for i, name in enumerate(graph.outputs)}


def other_sizes(graph: ExportGraph) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Sizes (H, W) that a graph with ``input=dynamic`` is tried at.

    Returns:
        Those that it must take (larger, odd, portrait and landscape), and smaller ones, which a network of
        many strides may be too deep for.
    """
    height, width = graph.how.height, graph.how.width
    larger = [(height + 32, width), (height + 33, width + 65), (height, 2 * width + 1)]
    smaller = [(height - height // 4, width), (height - height // 5, width - width // 3)]
    return larger, smaller


def check_free_size(graph: ExportGraph) -> None:
    """`ModelError` where a model does not take images of any size, or where its outputs' widths depend on it.

    Found by running it in PyTorch; that the exported graph does the same is checked on the graph.
    """
    name = type(graph.model).__name__
    if any(view.rows is not None or view.columns is not None for view in _views(graph.model)):
        raise ModelError(
            f"input=dynamic: a member of {name} is given images of another size, by a resize that is made "
            f"for {graph.how.height}x{graph.how.width} pixels. Use input=fixed or input=picture."
        )
    usual = {key: values.shape for key, values in run_graph(graph, graph.example(1).numpy()).items()}
    for height, width in other_sizes(graph)[0]:
        try:
            found = run_graph(graph, np.zeros((1, height, width, 3), np.uint8))
        except Exception as error:  # whatever the module raises
            raise ModelError(
                f"input=dynamic: {name} does not take images of {height}x{width} pixels: "
                f"{str(error).strip().splitlines()[0]} Use input=fixed or input=picture."
            ) from error
        for key, values in found.items():
            if values.shape != usual[key]:
                raise ModelError(
                    f"input=dynamic: the width of '{key}' depends on the size of the image ({usual[key][1]} "
                    f"at {graph.how.height}x{graph.how.width}, {values.shape[1]} at {height}x{width}). "
                    f"Use another pool= than {graph.pool}."
                )


def _views(model: nn.Module) -> list[View]:
    return [module for module in model.modules() if isinstance(module, View)]
