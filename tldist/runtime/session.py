"""One ONNX Runtime session: the execution provider that was asked for runs, or it is an error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tldist.errors import MachineError, PackageError, close_matches, needs

INPUT = "images"
"""The name of the one input: uint8 (batch, H, W, 3), RGB."""

CPU = "CPUExecutionProvider"

_SILENT = 4
# y = Identity(x), 65 bytes of ONNX: what a provider is tried with before anything is exported for it.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


@dataclass(frozen=True)
class Session:
    """A loaded graph from images to vectors.

    Attributes:
        raw: the ``onnxruntime.InferenceSession``.
        provider: the execution provider that runs it.
        height, width: pixels of its input; None: any.
        outputs: width of each output, by name, in the graph's order.
        metadata: what the graph says about itself.
    """

    raw: Any
    provider: str
    height: int | None
    width: int | None
    outputs: dict[str, int]
    metadata: dict[str, str]

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the graph.

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
        values = self.raw.run(list(self.outputs), {INPUT: np.ascontiguousarray(images)})
        return {name: np.asarray(value, np.float32) for name, value in zip(self.outputs, values)}

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether it takes images of a shape (H, W, 3)."""
        height, width, channels = shape
        return channels == 3 and self.height in (None, height) and self.width in (None, width)


def open_session(
    model: Path,
    *,
    provider: str = CPU,
    provider_options: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> Session:
    """Load a graph.

    Args:
        model: the ``.onnx`` file.
        provider: ONNX Runtime's name of the execution provider.
        provider_options: as ONNX Runtime documents them for it.
        threads: that one operator may use; None: ONNX Runtime's choice, all cores.

    Raises:
        MissingExtra: ONNX Runtime is not installed.
        MachineError: the provider does not exist here.
        PackageError: the file is missing or damaged, or no graph from images to vectors.
    """
    _check_name(provider)
    if not model.is_file():
        raise PackageError(f"{model}: no such file (expected an ONNX graph).")
    raw = _create(str(model), provider, provider_options, threads)
    shape = _shape_of(model, raw)
    outputs = {value.name: _width_of(model, value) for value in raw.get_outputs()}
    metadata = dict(raw.get_modelmeta().custom_metadata_map)
    return Session(raw, provider, shape[0], shape[1], outputs, metadata)


def require_provider(provider: str, provider_options: Mapping[str, str] | None = None) -> None:
    """`MachineError` where an execution provider does not work here, found by running something on it."""
    _check_name(provider)
    _create(_IDENTITY, provider, provider_options, threads=1)


def _onnxruntime() -> ModuleType:
    with needs("cpu"):
        import onnxruntime
    # It prints its own account of every failed provider; ours is an exception.
    onnxruntime.set_default_logger_severity(_SILENT)
    module: ModuleType = onnxruntime
    return module


def _check_name(provider: str) -> None:
    ort = _onnxruntime()
    if provider not in ort.get_all_providers():
        hint = close_matches(provider, ort.get_all_providers())
        raise MachineError(f"unknown execution provider '{provider}'. {hint}")
    if provider not in ort.get_available_providers():
        raise MachineError(
            f"the execution provider '{provider}' is not part of the ONNX Runtime that is installed "
            f"(it has {', '.join(ort.get_available_providers())})."
        )


def _create(model: str | bytes, provider: str, options: Mapping[str, str] | None, threads: int | None) -> Any:
    ort = _onnxruntime()
    settings = ort.SessionOptions()
    settings.log_severity_level = _SILENT
    if threads is not None:
        settings.intra_op_num_threads = threads
    chosen = (provider, dict(options)) if options else provider
    try:
        # enable_fallback=0: else a provider that fails is replaced by the CPU with a printed line.
        session = ort.InferenceSession(model, settings, providers=[chosen], enable_fallback=0)
    except Exception as error:  # ONNX Runtime's own classes have no common base
        reason = " ".join(str(error).split())[:300]
        if provider != CPU or isinstance(model, bytes):
            raise MachineError(f"the execution provider '{provider}' fails here: {reason}") from error
        raise PackageError(f"{model}: damaged, or not an ONNX graph that runs here: {reason}") from error
    if session.get_providers()[0] != provider:
        # The list of available providers is made when ONNX Runtime is built; a provider whose libraries or
        # device are missing is left out without an error, and the CPU runs instead.
        there = ", ".join(dict.fromkeys(device.ep_name for device in ort.get_ep_devices()))
        raise MachineError(
            f"the execution provider '{provider}' was asked for, but '{session.get_providers()[0]}' would "
            f"run: its device or its libraries are missing (this machine offers: {there})."
        )
    return session


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


def _width_of(model: Path, value: Any) -> int:
    if len(value.shape) == 2 and isinstance(value.shape[1], int):
        return int(value.shape[1])
    raise PackageError(f"{model}: output '{value.name}' has shape {value.shape}, expected (batch, width).")
