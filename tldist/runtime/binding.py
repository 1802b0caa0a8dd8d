"""Running a graph with buffers on its device that are bound once for each shape and used again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

MOST_SHAPES = 8
"""Shapes of a batch whose buffers are kept. Of more, the one unused for longest gives up its buffers; with
CUDA graphs, which hold on to theirs, the shapes beyond run without one."""

_NO_GRAPH = -1
"""The ``gpu_graph_id`` of a run that neither records nor replays (ONNX Runtime: CUDA Execution Provider)."""


@dataclass(frozen=True)
class Bound:
    """The buffers of one shape.

    Attributes:
        binding: the ``onnxruntime.IOBinding`` that holds them.
        images: the input on the device, uint8 (N, H, W, 3).
        outputs: on the device, (N, D) each, by name.
        options: of a run: which CUDA graph is recorded and replayed.
    """

    binding: Any
    images: Any
    outputs: dict[str, Any]
    options: Any


class Bindings:
    """Buffers for the shapes that a session has seen; one run at a time.

    Args:
        ort: the module ``onnxruntime``.
        raw: the session.
        device: the kind of device as ONNX Runtime calls it (``cuda``, ``cpu``), and its number.
        input_name: name of the one input.
        outputs: width and NumPy type of each output, by name.
        graphs: whether the provider records CUDA graphs.
        batches: batch sizes to run at: others are filled up, or cut, to these; empty: any.
    """

    def __init__(
        self,
        ort: ModuleType,
        raw: Any,
        device: tuple[str, int],
        input_name: str,
        outputs: Mapping[str, tuple[int, type[np.generic]]],
        *,
        graphs: bool = False,
        batches: Sequence[int] = (),
    ) -> None:
        self._ort, self._raw, self._device = ort, raw, device
        self._input, self._outputs = input_name, dict(outputs)
        self._graphs, self._batches = graphs, tuple(sorted(batches))
        self._kept: OrderedDict[tuple[int, ...], Bound] = OrderedDict()
        self._lock = threading.Lock()

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 (N, H, W, 3), N at least 1, to float32 (N, D) of each output, by name."""
        most = self._batches[-1] if self._batches else len(images)
        with self._lock:  # the buffers are shared, and so is the device
            parts = [self._run(images[start : start + most]) for start in range(0, len(images), most)]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        size = next((size for size in self._batches if size >= len(images)), len(images))
        bound = self._bound((size, *images.shape[1:]))
        filled = images
        if size > len(images):
            filled = np.concatenate([images, np.zeros((size - len(images), *images.shape[1:]), np.uint8)])
        bound.images.update_inplace(np.ascontiguousarray(filled))
        self._raw.run_with_iobinding(bound.binding, bound.options)
        # A copy always: on the CPU the array may be the buffer itself, which the next run overwrites.
        return {
            name: np.array(value.numpy()[: len(images)], dtype=np.float32)
            for name, value in bound.outputs.items()
        }

    def _bound(self, shape: tuple[int, ...]) -> Bound:
        if shape in self._kept:
            self._kept.move_to_end(shape)
            return self._kept[shape]
        full = len(self._kept) >= MOST_SHAPES
        if full and self._graphs:
            return self._allocate(shape, _NO_GRAPH)
        if full:
            self._kept.popitem(last=False)
        # 0 is the graph of runs that name none, so ours begin at 1.
        self._kept[shape] = self._allocate(shape, len(self._kept) + 1 if self._graphs else _NO_GRAPH)
        return self._kept[shape]

    def _allocate(self, shape: tuple[int, ...], graph_id: int) -> Bound:
        new, binding = self._ort.OrtValue.ortvalue_from_shape_and_type, self._raw.io_binding()
        images = new(shape, np.uint8, *self._device)
        binding.bind_ortvalue_input(self._input, images)
        outputs = {
            name: new((shape[0], width), kind, *self._device) for name, (width, kind) in self._outputs.items()
        }
        for name, value in outputs.items():
            binding.bind_ortvalue_output(name, value)
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", str(graph_id))
        return Bound(binding, images, outputs, options)
