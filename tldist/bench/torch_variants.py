"""The part of bench that needs torch: a bundle's module in the variants of PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tldist.bench.timing import Run
from tldist.models.heads import tapped
from tldist.models.load import input_tensor, load_bundle
from tldist.runtime.package import LOGITS
from tldist.runtime.preprocess import Preprocessing

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Graph(nn.Module):
    """What the package computes, as a module: uint8 images to logits, or to the features that the head reads.

    Args:
        model: normalised images to logits.
        how: its preprocessing.
        output: ``logits`` or ``features``.
        l2: whether features are divided by their length.
        words: the variant: see `tldist.bench.recipe.WORDS`.
    """

    def __init__(
        self, model: nn.Module, how: Preprocessing, output: str, l2: bool, words: frozenset[str]
    ) -> None:
        super().__init__()
        weights = next((word for word in words if word.endswith("_weights")), "")
        self.dtype = _DTYPES[weights.removesuffix("_weights")] if weights else torch.float32
        self.format = torch.channels_last if "channels_last" in words else torch.contiguous_format
        self.autocast = next((_DTYPES[word] for word in words if word in _DTYPES), None)
        self.model = model.to(self.dtype).to(memory_format=self.format)
        self.how, self.output, self.l2 = how, output, l2

    def forward(self, images: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) to float32 (N, D)."""
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            return self._compute(input_tensor(images, self.how, self.format, self.dtype)).float()

    def _compute(self, images: Tensor) -> Tensor:
        if self.output == LOGITS:
            logits: Tensor = self.model(images)
            return logits
        with tapped(self.model) as features:
            self.model(images)
            found = features()
        return nn.functional.normalize(found) if self.l2 else found


class TorchModel:
    """A bundle's module on a device, in any variant.

    Args:
        bundle: its folder.
        output: ``logits`` or ``features``.
        l2: whether features are divided by their length.
        device: ``cpu`` or ``cuda``.
        trust_code: run code that the bundle names.
    """

    def __init__(self, bundle: Path, output: str, l2: bool, device: str, trust_code: bool) -> None:
        self._model, config = load_bundle(bundle, trust_code=trust_code)
        self._how, self._output, self._l2, self._device = config.preprocessing, output, l2, device

    def variant(self, name: str) -> Run:
        """Build one: words joined by +."""
        words = frozenset(name.split("+"))
        model = copy.deepcopy(self._model).to(self._device)
        graph = Graph(model, self._how, self._output, self._l2, words).eval()
        compute: Callable[[Tensor], Tensor] = graph
        if "compile" in words:
            mode = "reduce-overhead" if self._device == "cuda" else None
            compute = torch.compile(graph, dynamic=False, mode=mode)

        def run(images: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                output: np.ndarray = compute(torch.from_numpy(images).to(self._device)).cpu().numpy()
            return output

        return run


@contextmanager
def threads(count: int) -> Iterator[None]:
    """While inside, PyTorch uses so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def forget_compiled() -> None:
    """Drop what torch.compile made so far."""
    torch.compiler.reset()
