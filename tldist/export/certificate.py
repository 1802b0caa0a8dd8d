"""The certificate of a package: its parity report, bound to the bundle, the files and the machine."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tldist.errors import PackageError, TldistError
from tldist.export.verdict import FORMAT, Verdict
from tldist.files import read_json, sha256_file
from tldist.runtime.package import MODEL, PARITY, REFERENCE, PackageConfig

_LIBRARIES = ("torch", "torchvision", "numpy", "pillow", "onnx", "onnxscript")
_FLAGS = {
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimddp", "i8mm", "bf16", "sve",
}  # fmt: skip
"""The CPU's abilities that decide by which kernel a product of int8, bfloat16 or float32 is computed."""


def certify(verdict: Verdict, folder: Path, config: PackageConfig) -> dict[str, Any]:
    """The parity report of a package that is being written: write it as ``parity.json``.

    Args:
        verdict: on the graph that lies in ``folder``.
        folder: it holds the graph, its external data if any, and the reference samples.
        config: what ``package.json`` will say.
    """
    profile = config.profile
    return {
        "format": FORMAT,
        **verdict.to_dict(),
        "bundle": config.bundle,
        "profile": profile,
        "precision": profile.get("precision"),
        "exporter": config.exporter,
        "steps": list(config.steps),
        "input": config.input,
        "optimization": OPTIMIZATION,
        "provider_options": profile.get("provider_options") or {},
        "files": {
            name: sha256_file(folder / name) for name in _certified(file.name for file in folder.iterdir())
        },
        "onnxruntime": onnxruntime_version(),
        "versions": library_versions(),
        "machine": describe_machine(),
    }


OPTIMIZATION = "ORT_ENABLE_ALL"
"""ONNX Runtime's graph optimisation level in every session that `tldist.runtime` opens: its default, so that
parity is measured on what serves."""


def _certified(names: Iterable[str]) -> list[str]:
    """The graph with its external data, and the reference samples."""
    return sorted(name for name in names if name.startswith(MODEL) or name == REFERENCE)


def certificate_problems(folder: Path, config: PackageConfig) -> list[str]:
    """Why a package's certificate is not about this package; empty where it is."""
    try:
        certificate = read_json(folder / PARITY, PackageError, "parity report")
    except TldistError as error:
        return [str(error)]
    path = folder / PARITY
    if not isinstance(certificate, dict) or not isinstance(certificate.get("files"), dict):
        return [f"{path}: not a parity report."]
    recorded = {name: config.files[name] for name in _certified(config.files)}
    if certificate["files"] != recorded or certificate.get("bundle") != config.bundle:
        return [f"{path}: certifies another graph, or another bundle."]
    if certificate.get("parity") != "PASS":
        return [f"{path}: says that parity failed."]
    if certificate.get("profile") != config.profile:
        return [f"{path}: certifies another profile (tolerances, provider or precision)."]
    return []


def machine_difference(folder: Path) -> str:
    """In which abilities this CPU differs from the one that certified the package; empty: in none."""
    try:
        there = read_json(folder / PARITY, PackageError, "parity report").get("machine", {})
        features = set(there["features"])
    except (TldistError, AttributeError, KeyError, TypeError):
        return ""  # an older package, or a damaged report, which is a problem of its own
    here = set(describe_machine()["features"])
    if not features or features == here:
        return ""
    gone, new = sorted(features - here), sorted(here - features)
    words = [f"without {', '.join(gone)}"] if gone else []
    words += [f"with {', '.join(new)}"] if new else []
    return f"made on {there.get('cpu')}; this machine is {_cpu_name()}, {' and '.join(words)}"


def library_versions() -> dict[str, str]:
    """The libraries that a package's numbers depend on, as far as they are installed."""
    found = {}
    for library in _LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def onnxruntime_version() -> str:
    """Of the one that is imported: two distributions bring it under one name."""
    import onnxruntime

    return str(onnxruntime.__version__)


def describe_machine() -> dict[str, Any]:
    """System, CPU, and the CPU's abilities that numbers depend on, as plain JSON data."""
    return {"system": platform.system(), "architecture": platform.machine(), "cpu": _cpu_name()} | {
        "features": sorted(_FLAGS & _cpu_flags())
    }


def _cpu_flags() -> set[str]:
    """As Linux names them; elsewhere as far as NumPy looks for them."""
    listed = _cpu_info("flags") or _cpu_info("Features")
    if listed:
        return set(listed.split())
    found: Any = np.show_config(mode="dicts")
    extensions = found.get("SIMD Extensions", {}) if isinstance(found, dict) else {}
    return {str(name).lower() for part in extensions.values() for name in part}


def _cpu_name() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_info(key: str) -> str:
    """The first value of a key of /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return ""
    for line in path.read_text(errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""
