"""ONNX Runtime: one build installed, it loads, and its CUDA provider is more than a name."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from tldist.doctor.finding import Check, Finding
from tldist.doctor.libraries import installed_version

BUILDS = ("onnxruntime", "onnxruntime-gpu")
_REPAIR = "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'tldist[{extra}]'"


def check_runtime(has_gpu: bool) -> Check:
    """Look at ONNX Runtime.

    Args:
        has_gpu: whether this machine has an NVIDIA GPU.
    """
    builds = [name for name in BUILDS if installed_version(name)]
    extra = "gpu" if has_gpu else "cpu"
    findings: list[Finding] = []
    if len(builds) == 2:
        findings.append(
            Finding(
                "broken",
                "both onnxruntime and onnxruntime-gpu are installed: they own the same package, and the one "
                "installed last has overwritten the other",
                _REPAIR.format(extra=extra),
            )
        )
    if importlib.util.find_spec("onnxruntime") is None:
        what = "ONNX Runtime is not installed: packages cannot be run or checked here"
        findings.append(Finding("note", what, f"pip install 'tldist[{extra}]'"))
        return Check({"builds": builds, "providers": []}, ("ONNX Runtime: none",), tuple(findings))
    try:
        providers = usable_providers()
    except Exception as error:
        what = f"onnxruntime cannot be used ({type(error).__name__}: {error})"
        findings.append(Finding("broken", what, _REPAIR.format(extra=extra)))
        return Check({"builds": builds, "providers": []}, ("ONNX Runtime: broken",), tuple(findings))
    if has_gpu and "CUDAExecutionProvider" not in providers:
        findings.append(_no_cuda(builds))
    lines = (f"ONNX Runtime can use: {', '.join(providers)}",)
    return Check({"builds": builds, "providers": providers}, lines, tuple(findings))


def usable_providers() -> list[str]:
    """The execution providers that have a device here.

    ``get_available_providers`` lists what was compiled in, and a session falls back in silence; the
    devices are what ONNX Runtime found when it tried.
    """
    runtime: Any = importlib.import_module("onnxruntime")
    runtime.set_default_logger_severity(4)
    return list(dict.fromkeys(device.ep_name for device in runtime.get_ep_devices()))


def _no_cuda(builds: list[str]) -> Finding:
    if "onnxruntime-gpu" not in builds:
        what = "this machine has a GPU, but the ONNX Runtime installed is the one for CPUs"
        return Finding("note", what, _REPAIR.format(extra="gpu"))
    what = "this machine has a GPU, but ONNX Runtime cannot load its CUDA provider (CUDA or cuDNN is missing)"
    return Finding("broken", what, "pip install 'onnxruntime-gpu[cuda,cudnn]', or install CUDA and cuDNN")
