"""One ONNX Runtime session: the execution provider that was asked for runs, or it is an error."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tldist.errors import MachineError, PackageError
from tldist.runtime.binding import Bindings
from tldist.runtime.placement import CPU as CPU
from tldist.runtime.placement import Placement, assigned, list_counts, profiled
from tldist.runtime.provider import DEVICES, Settings, check_provider, create_session, onnx_runtime
from tldist.runtime.provider import require_provider as require_provider

INPUT = "images"
"""The name of the one input: uint8 (batch, H, W, 3), RGB."""

LOGITS, PROBABILITIES, FEATURES = "logits", "probabilities", "features"
"""The names of a graph's outputs. A classifier's first one is the logits. Those of inner layers are called
``features.LAYER``."""
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}
_TRIAL_SIZE = 256
"""Pixels of a trial image where the graph takes any size."""


@dataclass(frozen=True)
class Session:
    """A loaded graph from images to vectors.

    Attributes:
        raw: the ``onnxruntime.InferenceSession``.
        provider: the execution provider that runs it.
        height, width: pixels of its input; None: any.
        outputs: width of each output, by name, in the graph's order.
        metadata: what the graph says about itself.
        settings: how it runs.
        placement: where its nodes run; None: all on the CPU, by an ONNX Runtime before 1.24.
        bindings: buffers on the provider's device; None: ONNX Runtime copies.
    """

    raw: Any
    provider: str
    height: int | None
    width: int | None
    outputs: dict[str, int]
    metadata: dict[str, str]
    settings: Settings = field(default_factory=Settings)
    placement: Placement | None = None
    bindings: Bindings | None = None

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the graph; several threads may.

        Args:
            images: uint8 (N, H, W, 3), RGB; N may be any number.

        Returns:
            float32 (N, D) of each output, by name.

        Raises:
            PackageError: images of another type or size.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or not self.takes(images.shape[1:]):
            raise PackageError(
                f"expected uint8 images (N, {self.height or 'H'}, {self.width or 'W'}, 3), "
                f"found {images.dtype} {images.shape}. tldist.runtime.preprocess.prepare makes them."
            )
        if not len(images):
            return {name: np.zeros((0, width), np.float32) for name, width in self.outputs.items()}
        if self.bindings is not None:
            return self.bindings.run(images)
        values = self.raw.run(list(self.outputs), {INPUT: np.ascontiguousarray(images)})
        return {name: np.asarray(value, np.float32) for name, value in zip(self.outputs, values)}

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether it takes images of a shape (H, W, 3)."""
        height, width, channels = shape
        return channels == 3 and self.height in (None, height) and self.width in (None, width)

    def describe(self) -> dict[str, Any]:
        """How it runs, as plain JSON data: for logs and reports."""
        return {
            "provider": self.provider,
            "provider_options": self.raw.get_provider_options().get(self.provider, {}),
            "placement": self.placement.nodes if self.placement else {},
            **asdict(self.settings),
            "onnxruntime": str(onnx_runtime().__version__),
        }


def open_session(
    model: Path,
    *,
    provider: str = CPU,
    provider_options: Mapping[str, str] | None = None,
    threads: int | None = None,
    settings: Settings | None = None,
) -> Session:
    """Load a graph.

    Args:
        model: the ``.onnx`` file.
        provider: ONNX Runtime's name of the execution provider.
        provider_options: as ONNX Runtime documents them for it.
        threads: short for ``settings`` with these threads.
        settings: how it runs.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        MachineError: the provider does not exist here, or would leave the model's work to the CPU.
        PackageError: the file is missing or damaged, or no graph from images to vectors.
    """
    how = settings or Settings(threads=threads)
    check_provider(provider, how)
    if not model.is_file():
        raise PackageError(f"{model}: no such file (expected an ONNX graph).")
    options = dict(provider_options or {})
    if how.cuda_graphs:
        options["enable_cuda_graph"] = "1"
    with tempfile.TemporaryDirectory() as folder:  # for ONNX Runtime's profile, where it writes one
        raw = create_session(str(model), provider, options, how, Path(folder))
        shape = _shape_of(model, raw)
        placement = assigned(raw) or (None if provider == CPU else _profile(raw, shape))
    _check_placement(placement, provider, how.max_cpu_nodes)
    outputs = {value.name: _output_of(model, value) for value in raw.get_outputs()}
    return Session(
        raw,
        provider,
        *shape,
        outputs={name: width for name, (width, _) in outputs.items()},
        metadata=dict(raw.get_modelmeta().custom_metadata_map),
        settings=how,
        placement=placement,
        bindings=_bind(raw, provider, options, how, outputs) if provider in DEVICES else None,
    )


def _profile(raw: Any, shape: tuple[int | None, int | None]) -> Placement:
    """Where the nodes of one run ran, for an ONNX Runtime that does not remember where it put them."""
    images = np.zeros((1, shape[0] or _TRIAL_SIZE, shape[1] or _TRIAL_SIZE, 3), np.uint8)
    options = onnx_runtime().RunOptions()
    options.add_run_config_entry("gpu_graph_id", "-1")  # a trial is not to be recorded
    raw.run(None, {INPUT: images}, options)
    return profiled(Path(raw.end_profiling()))


def _check_placement(placement: Placement | None, provider: str, most: int) -> None:
    fallen = placement.fallen(provider) if placement else {}
    if sum(fallen.values()) > most:
        raise MachineError(
            f"'{provider}' was asked for, but it leaves {sum(fallen.values())} nodes to the CPU: "
            f"{list_counts(fallen)} (allowed: {most}, by max_cpu_nodes). Export for a provider that has "
            f"these operators in this precision, or allow them."
        )


def _bind(
    raw: Any,
    provider: str,
    options: dict[str, str],
    how: Settings,
    outputs: dict[str, tuple[int, type[np.generic]]],
) -> Bindings:
    records = str(options.get("enable_cuda_graph", "0")).lower() in ("1", "true")
    device = DEVICES.get(provider, "cpu"), int(options.get("device_id", "0"))
    return Bindings(onnx_runtime(), raw, device, INPUT, outputs, graphs=records, batches=how.cuda_graphs)


def _shape_of(model: Path, raw: Any) -> tuple[int | None, int | None]:
    """(H, W) of the one input; None where any will do."""
    found = [(value.name, value.type, value.shape) for value in raw.get_inputs()]
    if len(found) == 1 and found[0][:2] == (INPUT, "tensor(uint8)") and len(found[0][2]) == 4:
        batch, height, width, channels = found[0][2]
        if isinstance(batch, str) and channels == 3:
            return (height if isinstance(height, int) else None), (width if isinstance(width, int) else None)
    raise PackageError(
        f"{model}: not a graph that tldist exported: expected one input '{INPUT}', uint8 (batch, H, W, 3), "
        f"found {found}."
    )


def _output_of(model: Path, value: Any) -> tuple[int, type[np.generic]]:
    """Width and type of an output."""
    if len(value.shape) == 2 and isinstance(value.shape[1], int) and value.type in _TYPES:
        return int(value.shape[1]), _TYPES[value.type]
    raise PackageError(
        f"{model}: output '{value.name}' is {value.type} {value.shape}, expected floats (batch, width)."
    )
