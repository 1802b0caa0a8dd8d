"""Creating an ONNX Runtime session on the execution provider that was asked for, or saying why not."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tldist.errors import MachineError, PackageError, close_matches, needs
from tldist.runtime.placement import CPU, RECORD

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
DEVICES = {CUDA: "cuda", TENSORRT: "cuda"}
"""Providers whose inputs and outputs are bound to buffers on their device, and ONNX Runtime's word for it."""
_LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
_SILENT = 4
# y = Identity(x), 65 bytes of ONNX: what a provider is tried with before anything is exported for it.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


@dataclass(frozen=True)
class Settings:
    """How a graph is run; none of it changes what it computes by more than rounding.

    Attributes:
        threads: that one operator may use; None: ONNX Runtime's choice, all cores.
        spinning: whether idle threads wait in a loop: quicker at the next request, and a third more
            processor time. A server that shares its machine turns it off.
        optimization: ONNX Runtime's level of graph optimisation. Only ``all`` brings the CPU's fast layouts.
        cuda_graphs: batch sizes whose launches are recorded once and replayed (CUDA alone): others are
            filled up, or cut, to these. Empty: none is recorded, unless the provider's own options say
            ``enable_cuda_graph``; then the first few shapes that come are.
        max_cpu_nodes: how many nodes may run on the CPU where another provider was asked for, beside the
            arithmetic of shapes, which belongs there.
    """

    threads: int | None = None
    spinning: bool = True
    optimization: Literal["all", "extended", "basic", "none"] = "all"
    cuda_graphs: tuple[int, ...] = ()
    max_cpu_nodes: int = 0


def onnx_runtime() -> ModuleType:
    """The module, with its own log turned off."""
    with needs("cpu"):
        import onnxruntime
    # It prints its own account of every failed provider; ours is an exception.
    onnxruntime.set_default_logger_severity(_SILENT)
    module: ModuleType = onnxruntime
    return module


def check_provider(provider: str, how: Settings) -> None:
    """`MachineError` where a provider is no part of this ONNX Runtime, or does not know what is set."""
    ort = onnx_runtime()
    if provider not in ort.get_all_providers():
        hint = close_matches(provider, ort.get_all_providers())
        raise MachineError(f"unknown execution provider '{provider}'. {hint}")
    if provider not in ort.get_available_providers():
        raise MachineError(
            f"the execution provider '{provider}' is not part of the ONNX Runtime that is installed "
            f"(it has {', '.join(ort.get_available_providers())})."
        )
    if how.optimization not in _LEVELS:
        raise MachineError(f"optimization '{how.optimization}'. {close_matches(how.optimization, _LEVELS)}")
    if how.cuda_graphs and provider != CUDA:
        raise MachineError(f"CUDA graphs are recorded by {CUDA} alone; the provider here is '{provider}'.")
    if any(size < 1 for size in how.cuda_graphs):
        raise MachineError(f"CUDA graphs are recorded for batch sizes of 1 or more, not {how.cuda_graphs}.")


def create_session(
    model: str | bytes, provider: str, options: dict[str, str], how: Settings, profile: Path | None = None
) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        model: an ``.onnx`` file, or its bytes.
        provider: as ONNX Runtime calls it.
        options: of the provider.
        how: it runs.
        profile: a folder for ONNX Runtime's profile, where nothing else tells where its nodes run.

    Raises:
        MachineError: the provider does not work here.
        PackageError: it does, and the model is damaged.
    """
    ort = onnx_runtime()
    if provider in DEVICES:
        _load_cuda_libraries(ort)
    try:
        # enable_fallback=0: else a provider that fails is replaced by the CPU with a printed line.
        session = ort.InferenceSession(
            model,
            _session_options(ort, how, profile if provider != CPU else None),
            providers=_chain(provider, options),
            enable_fallback=0,
        )
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


def require_provider(provider: str, provider_options: Mapping[str, str] | None = None) -> None:
    """`MachineError` where an execution provider does not work here, found by running something on it."""
    check_provider(provider, Settings())
    create_session(_IDENTITY, provider, dict(provider_options or {}), Settings(threads=1))


def _session_options(ort: ModuleType, how: Settings, profile: Path | None) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = _SILENT
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, _LEVELS[how.optimization])
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if how.spinning else "0")
    options.add_session_config_entry(RECORD, "1")
    if how.threads is not None:
        options.intra_op_num_threads = how.threads
    if profile is not None and not hasattr(ort.InferenceSession, "get_provider_graph_assignment_info"):
        options.enable_profiling = True
        options.profile_file_prefix = str(profile / "profile")
    return options


def _chain(provider: str, options: dict[str, str]) -> list[Any]:
    """The provider with its options; what TensorRT does not take runs on the same GPU by CUDA."""
    device = {"device_id": options["device_id"]} if "device_id" in options else {}
    return [(provider, options), *([(CUDA, device)] if provider == TENSORRT else [])]


def _load_cuda_libraries(ort: ModuleType) -> None:
    """Find CUDA and cuDNN in the NVIDIA packages of pip, as ``import torch`` would."""
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # what it did not find; ours is an exception
            ort.preload_dlls()
