"""A Triton model repository from a package: what it says about the graph is read from the graph.

The format is Triton's ``model_config.proto``; the options of execution providers are those of its ONNX
Runtime backend (github.com/triton-inference-server/onnxruntime_backend, src/onnxruntime.cc).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from tldist.errors import MachineError, PackageError
from tldist.files import atomic_folder
from tldist.progress import warn
from tldist.runtime.package import LOGITS, MODEL, PROBABILITIES, PackageConfig, open_graph, read_package
from tldist.runtime.provider import CUDA, TENSORRT
from tldist.runtime.session import CPU, INPUT, Session

CONFIG, LABELS, VERSION = "config.pbtxt", "labels.txt", "1"
MARK = "tldist.package"
"""The parameter that holds the package's identity; a model folder without it is not ours to replace."""

_TYPES = {
    "tensor(uint8)": "TYPE_UINT8",
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(bfloat16)": "TYPE_BF16",
}
_RENAMED = {
    "trt_max_workspace_size": "max_workspace_size_bytes",
    "trt_int8_calibration_table_name": "int8_calibration_table_name",
    "trt_int8_use_native_calibration_table": "int8_use_native_calibration_table",
}
_PRECISIONS = {"trt_int8_enable": "INT8", "trt_bf16_enable": "BF16", "trt_fp16_enable": "FP16"}
_TENSORRT = (
    "trt_max_partition_iterations", "trt_min_subgraph_size", "trt_dla_enable", "trt_dla_core",
    "trt_engine_cache_enable", "trt_engine_cache_path", "trt_engine_cache_prefix", "trt_dump_subgraphs",
    "trt_force_sequential_engine_build", "trt_context_memory_sharing_enable",
    "trt_layer_norm_fp32_fallback", "trt_timing_cache_enable", "trt_timing_cache_path",
    "trt_force_timing_cache", "trt_detailed_build_log", "trt_build_heuristics_enable",
    "trt_sparsity_enable", "trt_builder_optimization_level", "trt_auxiliary_streams",
    "trt_tactic_sources", "trt_extra_plugin_lib_paths", "trt_profile_min_shapes",
    "trt_profile_max_shapes", "trt_profile_opt_shapes",
)  # fmt: skip
"""The options of TensorRT that Triton's backend takes under ONNX Runtime's names."""
_TRITONS_OWN = ("device_id", "user_compute_stream", "has_user_compute_stream", "enable_cuda_graph")
"""Options that Triton sets by itself, or that need inputs at fixed addresses, which it does not give."""


def write_triton(
    package: str | os.PathLike[str],
    repository: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_batch: int = 32,
    max_delay_ms: float = 5,
) -> Path:
    """Write ``repository/NAME``: ``config.pbtxt``, ``labels.txt`` and ``1/model.onnx``.

    Args:
        package: the package's folder; its hashes are checked.
        repository: Triton's model repository; its other models are left alone.
        name: of the model; None: of the package's folder.
        max_batch: images that Triton runs at once.
        max_delay_ms: milliseconds that a request waits for others to share its batch.

    Returns:
        The model's folder. An older one that tldist wrote there is replaced.

    Raises:
        PackageError: the package is damaged, needs what Triton's backend has not, or the name is taken.
        MachineError: its graph can be read neither on its own provider nor on the CPU.
    """
    folder = Path(package).resolve()
    config = read_package(folder)
    target = Path(repository) / (name or re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.name))
    if target.exists() and MARK not in _text_of(target / CONFIG):
        raise PackageError(
            f"{target} exists, and tldist did not write it; choose another name or repository."
        )
    text = describe(target.name, config, _read_graph(folder, config), max_batch, max_delay_ms)
    with atomic_folder(target) as temporary:
        (temporary / VERSION).mkdir()
        for file in config.files:
            if file.startswith(MODEL):  # the graph, and its external data
                shutil.copyfile(folder / file, temporary / VERSION / file)
        if config.classes:
            (temporary / LABELS).write_text(_labels(config.classes), encoding="utf-8")
        (temporary / CONFIG).write_text(text, encoding="utf-8")
    return target


def describe(name: str, config: PackageConfig, session: Session, max_batch: int, max_delay_ms: float) -> str:
    """The text of ``config.pbtxt`` for a loaded graph."""
    sizes = sorted({max(1, max_batch // 4), max_batch})
    kind = "KIND_CPU" if _provider(config) == CPU else "KIND_GPU"
    batching = f"max_queue_delay_microseconds: {round(max_delay_ms * 1000)}"
    image = [_of(value) for value in session.raw.get_inputs()]
    return "\n".join(
        [
            f"name: {_quote(name)}",
            'backend: "onnxruntime"',
            f"max_batch_size: {max_batch}",
            *(f"input {{ {_tensor(*value)} }}" for value in image),
            *(f"output {{ {_output(value, config)} }}" for value in session.raw.get_outputs()),
            f"dynamic_batching {{ {_repeat('preferred_batch_size', sizes)} {batching} }}",
            f"instance_group {{ kind: {kind} count: 1 }}",
            *_accelerators(config),
            *(_warmup(size, image[0][1], config) for size in sorted({1, *sizes})),
            f"parameters {{ key: {_quote(MARK)} value {{ string_value: {_quote(config.identity)} }} }}",
            "",
        ]
    )


def _text_of(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _provider(config: PackageConfig) -> str:
    provider = str(config.profile.get("provider", CPU))
    if provider not in (CPU, CUDA, TENSORRT):
        raise PackageError(
            f"Triton's ONNX Runtime backend runs {CPU}, {CUDA} and {TENSORRT}; the package was made for "
            f"{provider}."
        )
    return provider


def _read_graph(folder: Path, config: PackageConfig) -> Session:
    """Load the graph only to ask for its names: on the CPU, unless only its own provider can read it."""
    try:
        return open_graph(folder, config, threads=1, provider=CPU)
    except (MachineError, PackageError):
        return open_graph(folder, config, threads=1)


def _of(value: object) -> tuple[str, str, list[int]]:
    """(name, type in Triton's words, dims without the batch; -1: any) of an input or output of a graph."""
    name, kind, shape = value.name, value.type, value.shape  # type: ignore[attr-defined]
    if kind not in _TYPES:
        raise PackageError(f"'{name}' is of type {kind}; expected one of {', '.join(_TYPES)}.")
    return name, _TYPES[kind], [size if isinstance(size, int) else -1 for size in shape[1:]]


def _tensor(name: str, kind: str, dims: list[int]) -> str:
    return f"name: {_quote(name)} data_type: {kind} {_repeat('dims', dims)}"


def _output(value: object, config: PackageConfig) -> str:
    name, kind, dims = _of(value)
    labels = (
        f" label_filename: {_quote(LABELS)}" if config.classes and name in (LOGITS, PROBABILITIES) else ""
    )
    return _tensor(name, kind, dims) + labels


def _warmup(size: int, kind: str, config: PackageConfig) -> str:
    """One run of a batch size before the model is ready; what takes any size is shown its usual one."""
    how = config.preprocessing
    shape = [how.resize, how.resize, 3] if config.input == "picture" else [how.height, how.width, 3]
    value = f"data_type: {kind} {_repeat('dims', shape)} zero_data: true"
    inputs = f"inputs {{ key: {_quote(INPUT)} value {{ {value} }} }}"
    return f'model_warmup {{ name: "batch of {size}" batch_size: {size} {inputs} }}'


def _accelerators(config: PackageConfig) -> list[str]:
    """The profile's provider with its options, as Triton's backend takes them."""
    provider = _provider(config)
    options: Mapping[str, str] = config.profile.get("provider_options") or {}
    if provider == CPU:
        return []
    name, known = ("cuda", dict(options)) if provider == CUDA else ("tensorrt", _tensorrt(options))
    for option in _TRITONS_OWN:
        known.pop(option, None)
    left_out = set(options) - set(known) - set(_RENAMED) - set(_PRECISIONS)
    if left_out:
        warn(f"Triton decides or does not know these options of {provider}: {', '.join(sorted(left_out))}")
    given = " ".join(
        f"parameters {{ key: {_quote(key)} value: {_quote(value)} }}" for key, value in sorted(known.items())
    )
    chosen = f"gpu_execution_accelerator {{ name: {_quote(name)} {given} }}"
    return [f"optimization {{ execution_accelerators {{ {chosen} }} }}"]


def _tensorrt(options: Mapping[str, str]) -> dict[str, str]:
    known = {key: value for key, value in options.items() if key in _TENSORRT}
    known |= {new: options[old] for old, new in _RENAMED.items() if old in options}
    on = [word for key, word in _PRECISIONS.items() if str(options.get(key, "")).lower() in ("1", "true")]
    if len(on) > 1:
        warn(f"Triton takes one precision of TensorRT: {on[0]}, not {', '.join(on[1:])} as well")
    return known | ({"precision_mode": on[0]} if on else {})


def _labels(classes: Iterable[str]) -> str:
    """One class a line; a line break within a name would shift all that follow."""
    return "".join(f"{' '.join(name.splitlines())}\n" for name in classes)


def _repeat(field: str, values: Iterable[int]) -> str:
    return f"{field}: [ {', '.join(map(str, values))} ]"


def _quote(text: str) -> str:
    """A string of the protobuf text format (its escapes are those of JSON)."""
    return json.dumps(text, ensure_ascii=False)
