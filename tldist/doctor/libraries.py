"""Which libraries are installed, and whether they fit each other."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import importlib.util
from collections.abc import Iterator

from tldist.doctor.finding import Check, Finding

EXTRAS: dict[str, tuple[str, ...]] = {
    "train": (
        "torch",
        "torchvision",
        "accelerate",
        "onnx",
        "onnxscript",
        "torchmetrics",
        "scipy",
        "ml_dtypes",
        "blake3",
        "imagehash",
        "tensorboard",
        "onnxruntime",
    ),
    "embed": ("pyarrow", "tqdm"),
    "serve": ("starlette", "uvicorn", "httptools", "python_multipart", "prometheus_client"),
    "report": ("jinja2", "matplotlib"),
    "demo": ("sklearn",),
    "timm": ("timm",),
    "peft": ("peft",),
}
"""The import names that each extra brings (tests hold this equal to pyproject.toml)."""

DISTRIBUTIONS = (
    "numpy", "pillow", "pydantic", "pyyaml", "safetensors", "torch", "torchvision", "accelerate", "onnx",
    "onnxscript", "onnxruntime", "onnxruntime-gpu", "pyarrow", "torchmetrics", "scipy", "ml-dtypes",
    "imagehash", "tensorboard", "matplotlib", "scikit-learn", "starlette", "uvicorn",
)  # fmt: skip


def check_libraries() -> Check:
    """Versions, extras, and the two libraries that break when they come from different builds."""
    versions = {name: version for name in DISTRIBUTIONS if (version := installed_version(name))}
    extras = {name: not missing for name, missing in missing_libraries().items()}
    findings = [*_missing_extras(), *_unmet_requirements(), *check_torchvision()]
    lines = (", ".join(f"{name} {version}" for name, version in versions.items()),)
    return Check({"versions": versions, "extras": extras}, lines, tuple(findings))


def installed_version(distribution: str) -> str | None:
    """The version of an installed distribution, None where it is not there."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def missing_libraries() -> dict[str, list[str]]:
    """For each extra, the libraries of it that cannot be found."""
    return {
        extra: [name for name in names if importlib.util.find_spec(name) is None]
        for extra, names in EXTRAS.items()
    }


def _missing_extras() -> Iterator[Finding]:
    for extra, missing in missing_libraries().items():
        if missing:
            what = f"the extra '{extra}' is not installed (missing: {', '.join(missing)})"
            yield Finding("note", what, f"if you need it: pip install 'tldist[{extra}]'")


def _unmet_requirements() -> Iterator[Finding]:
    """Installed versions outside of what tldist and torchvision ask for."""
    for owner in ("tldist", "torchvision"):
        if installed_version(owner) is None or importlib.util.find_spec("packaging") is None:
            continue  # packaging comes with the train extra; without it there is little that could clash
        from packaging.requirements import Requirement

        for text in metadata.requires(owner) or []:
            need = Requirement(text)
            found = installed_version(need.name)
            applies = need.marker is None or any(need.marker.evaluate({"extra": e}) for e in ("", *EXTRAS))
            if found and applies and not need.specifier.contains(found, prereleases=True):
                what = f"{need.name} {found} is installed, but {owner} needs {need.name}{need.specifier}"
                yield Finding("broken", what, f"pip install -U '{need.name}{need.specifier}' {owner}")


def check_torchvision() -> list[Finding]:
    """torchvision's operators are compiled against one torch; with another, the import fails."""
    if installed_version("torch") is None or importlib.util.find_spec("torch") is None:
        return []
    for name in ("torch", "torchvision"):
        if importlib.util.find_spec(name) is None:
            continue
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever a broken build raises is what we want to report
            versions = f"torch {installed_version('torch')}, torchvision {installed_version('torchvision')}"
            what = f"{name} cannot be imported ({type(error).__name__}: {error}); installed: {versions}"
            todo = "install both from one place: pip install --force-reinstall torch torchvision"
            return [Finding("broken", what, todo)]
    return []
