"""A package: one exported model entirely; opened, verified and run without torch.

A package is ``model.onnx`` + ``package.json`` + ``reference.safetensors`` + ``parity.json``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from tldist import __version__
from tldist.bundle import Task, verify_files
from tldist.errors import PackageError
from tldist.files import canonical_json, read_json, sha256_file, sha256_text, write_json
from tldist.runtime import selftest
from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.provider import Settings
from tldist.runtime.reference import read_reference
from tldist.runtime.session import CPU, Session, open_session
from tldist.runtime.session import FEATURES as FEATURES
from tldist.runtime.session import LOGITS as LOGITS
from tldist.runtime.session import PROBABILITIES as PROBABILITIES

CONFIG = "package.json"
MODEL = "model.onnx"
REFERENCE = "reference.safetensors"
PARITY = "parity.json"
FORMAT = "tldist.package/1"

T = TypeVar("T")

Input = Literal["fixed", "dynamic", "picture"]
"""What the graph takes, uint8 (batch, H, W, 3): images of the one size that the preprocessing makes; of any
size, computed at that size; or whole pictures of any size, which it resizes and crops itself."""


class _Stored(BaseModel):
    """The layout of ``package.json``; anything else is refused."""

    model_config = ConfigDict(extra="forbid")

    format: str
    classes: list[str]
    preprocessing: dict[str, Any]
    outputs: dict[str, int]
    profile: dict[str, Any]
    bundle: dict[str, str]
    lineage: dict[str, Any]
    files: dict[str, str]
    versions: dict[str, str]
    temperature: float = 1.0
    task: Task = "multiclass"
    input: Input = "fixed"
    exporter: dict[str, Any] = {}
    steps: list[dict[str, Any]] = []


@dataclass(frozen=True)
class PackageConfig:
    """What a package is, without its graph.

    Attributes:
        classes: names of the logits in order; empty for a feature extractor.
        preprocessing: from a decoded image to the graph's uint8 input (normalisation is in the graph).
        outputs: width of each output, by name, in the graph's order.
        profile: what it was exported for: name, precision, provider, tolerances.
        bundle: the bundle it was made from: its ``identity`` and the hash of its ``weights``.
        lineage: how that bundle came to be.
        files: SHA-256 of every file but ``package.json``.
        versions: of the libraries that made it.
        temperature: probabilities are ``softmax(logits / temperature)``, or ``sigmoid`` of that.
        task: multiclass (one class an image, softmax) or multilabel (any number of them, sigmoid).
        input: what the graph takes.
        exporter: which exporter made the graph, and why others did not.
        steps: what was done to the graph after that, one by one, with what each brought.
    """

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    outputs: dict[str, int]
    profile: dict[str, Any]
    bundle: dict[str, str]
    lineage: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    temperature: float = 1.0
    task: Task = "multiclass"
    input: Input = "fixed"
    exporter: dict[str, Any] = field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()

    @property
    def identity(self) -> str:
        """Hash of what the package computes: graph (with its external data), classes, preprocessing."""
        how = self.preprocessing.to_dict()
        graph = [digest for name, digest in sorted(self.files.items()) if name.startswith(MODEL)]
        return sha256_text(canonical_json([list(self.classes), how, *graph]))

    @property
    def profile_name(self) -> str:
        """The name of its profile."""
        return str(self.profile.get("name", ""))

    def graph_metadata(self) -> dict[str, str]:
        """What the graph says about itself, so that it serves without ``package.json`` too."""
        return {
            "classes": json.dumps(self.classes, ensure_ascii=False),
            "preprocessing": json.dumps(self.preprocessing.to_dict()),
            "outputs": json.dumps(list(self.outputs)),
            "temperature": json.dumps(self.temperature),
            "task": self.task,
            "input": self.input,
            "profile": self.profile_name,
            "bundle": self.bundle["identity"],
            "weights": self.bundle["weights"],
            "lineage": json.dumps(self.lineage, ensure_ascii=False),
            "tldist": self.versions.get("tldist", __version__),
        }


class Package:
    """An opened package.

    Attributes:
        path: its folder.
        config: what it is.
        session: the loaded graph.
    """

    def __init__(self, path: Path, config: PackageConfig, session: Session) -> None:
        self.path, self.config, self.session = path, config, session

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        verify: bool = True,
        self_test: bool = True,
        warm_up: Sequence[int] = (),
        provider: str | None = None,
        threads: int | None = None,
        spinning: bool = True,
        optimization: Literal["all", "extended", "basic", "none"] = "all",
        cuda_graphs: Sequence[int] = (),
        max_cpu_nodes: int | None = None,
    ) -> Package:
        """Open a package.

        Args:
            path: the folder.
            verify: compare hashes, and what the graph says about itself with ``package.json``.
            self_test: run some of the stored samples and compare with the stored answers.
            warm_up: batch sizes to run once, so that the first request does not pay for it.
            provider: ONNX Runtime's name of an execution provider; None: the one of the profile.
            threads, spinning, optimization, cuda_graphs, max_cpu_nodes: see
                `tldist.runtime.provider.Settings`; max_cpu_nodes None: what the profile allows.

        Raises:
            PackageError: not a package, damaged, its parts do not belong together, or it computes something
                else here than where it was made.
            MachineError: the provider does not exist here, or leaves the model's work to the CPU.
            MissingExtra: ONNX Runtime is not installed.
        """
        folder = Path(path)
        config = read_package(folder, verify=verify)
        most = _of_profile(config, "max_cpu_nodes", int, 0) if max_cpu_nodes is None else max_cpu_nodes
        how = Settings(threads, spinning, optimization, tuple(cuda_graphs), most)
        session = open_graph(folder, config, provider=provider, settings=how)
        problems = graph_problems(session, config) if verify else []
        if problems:
            raise PackageError(f"{folder}: {problems[0]}")
        package = cls(folder, config, session)
        if self_test:
            package.self_test()
        package.warm_up(warm_up)
        return package

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Run the graph; several threads may.

        Args:
            images: uint8 (N, H, W, 3), RGB, as `prepare` makes them; of any size where ``config.input`` is
                not ``fixed``, all of one call of the same.

        Returns:
            float32 (N, D) of each output, by name.
        """
        return self.session.run(images)

    def self_test(self, samples: int | None = selftest.SAMPLES) -> None:
        """Run stored samples (None: all) and compare with the stored answers.

        Raises:
            PackageError: an answer differs by more than the profile allows: which output, and by how much.
        """
        reference = read_reference(self.path / REFERENCE)
        tolerances = _of_profile(self.config, "tolerances", dict, {})
        problems = selftest.find_problems(
            self.session, reference, tolerances, samples, self.config.temperature
        )
        if problems:
            raise PackageError(f"{self.path}: {selftest.explain(problems, self.session)}")

    def warm_up(self, batches: Sequence[int] = (1,)) -> dict[int, float]:
        """Run grey images at the batch sizes that will be served.

        The first run at a size is slow: memory is planned, a GPU's kernels are chosen and loaded, a CUDA
        graph is recorded.

        Returns:
            Seconds of the first run, by batch size.
        """
        how = self.config.preprocessing
        seconds = {}
        for size in batches:
            images = np.full((size, how.height, how.width, 3), 127, np.uint8)
            start = time.perf_counter()
            self.run(images)
            seconds[size] = time.perf_counter() - start
            self.run(images)  # a recorded graph is replayed
        return seconds

    def describe(self) -> dict[str, Any]:
        """What runs here and how, as plain JSON data: for logs and reports."""
        return {
            "package": self.config.identity,
            "profile": self.config.profile_name,
            "input": self.config.input,
            **self.session.describe(),
        }


def is_package(path: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a package (its configuration is there)."""
    return (Path(path) / CONFIG).is_file()


def read_package(path: str | os.PathLike[str], *, verify: bool = True) -> PackageConfig:
    """Read a package's configuration and check its files.

    Args:
        path: the folder.
        verify: compare every file's SHA-256 with the one recorded.

    Raises:
        PackageError: not a package, an unknown format, a missing file, a hash that differs.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise PackageError(f"{folder}: no such folder (expected a package: {MODEL} and {CONFIG}).")
    if not is_package(folder):
        raise PackageError(f"{folder}: not a package: it has no {CONFIG}. `tldist export` writes packages.")
    raw = read_json(folder / CONFIG, PackageError, "package configuration")
    try:
        stored = _Stored(**raw)
        how = Preprocessing.from_dict(stored.preprocessing)
        bundle = {name: stored.bundle[name] for name in ("identity", "weights")}
    except (ValidationError, TypeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise PackageError(f"{folder / CONFIG}: not a package configuration: {reason}.") from error
    if stored.format != FORMAT:
        raise PackageError(f"{folder}: package format '{stored.format}'; this version reads '{FORMAT}'.")
    if MODEL not in stored.files:
        raise PackageError(f"{folder / CONFIG}: no hash is recorded for {MODEL}; the package is incomplete.")
    if verify:
        verify_files(folder, stored.files, PackageError)
    values = stored.model_dump(exclude={"format"})
    values |= {"classes": tuple(stored.classes), "preprocessing": how, "bundle": bundle}
    return PackageConfig(**values | {"steps": tuple(stored.steps)})


def write_package(folder: Path, config: PackageConfig) -> PackageConfig:
    """Write ``package.json`` beside the other files of a package, with their hashes; write it last."""
    files = {file.name: sha256_file(file) for file in sorted(folder.iterdir()) if file.name != CONFIG}
    written = replace(config, files=files)
    values = {**vars(written), "classes": list(written.classes), "steps": list(written.steps)}
    stored = _Stored(format=FORMAT, **values | {"preprocessing": written.preprocessing.to_dict()})
    write_json(folder / CONFIG, stored.model_dump())
    return written


def open_graph(
    folder: Path,
    config: PackageConfig,
    *,
    threads: int | None = None,
    provider: str | None = None,
    settings: Settings | None = None,
) -> Session:
    """Load a package's graph on a provider: the one that is given, else the profile's with its options."""
    own = str(config.profile.get("provider", CPU))
    chosen = provider or own
    options = _of_profile(config, "provider_options", dict, {}) if chosen == own else {}
    texts = {str(name): str(value) for name, value in options.items()}
    how = settings or Settings(threads=threads, max_cpu_nodes=_of_profile(config, "max_cpu_nodes", int, 0))
    return open_session(folder / MODEL, provider=chosen, provider_options=texts, settings=how)


def _of_profile(config: PackageConfig, name: str, kind: type[T], default: T) -> T:
    """A value of the stored profile; of another type than it should be, a `PackageError`."""
    value = config.profile.get(name, default)
    if not isinstance(value, kind):
        raise PackageError(f"{CONFIG}: the profile's {name} is {value!r}, expected {kind.__name__}.")
    return value


def file_problems(folder: Path, files: Mapping[str, str]) -> list[str]:
    """What is wrong with files of recorded SHA-256: one line for each that is missing or differs."""
    problems = []
    for name, digest in files.items():
        try:
            verify_files(folder, {name: digest}, PackageError)
        except PackageError as error:
            problems.append(str(error))
    return problems


def graph_problems(session: Session, config: PackageConfig) -> list[str]:
    """Where the graph and ``package.json`` contradict each other: one line for each."""
    problems = []
    if session.outputs != config.outputs:
        problems.append(f"the graph's outputs are {session.outputs}, {CONFIG} says {config.outputs}.")
    how = config.preprocessing
    size = (how.height, how.width) if config.input == "fixed" else (None, None)
    if (session.height, session.width) != size:
        problems.append(
            f"the graph takes {session.height}x{session.width} pixels, {CONFIG} says {size[0]}x{size[1]} "
            f"(None: any)."
        )
    if config.classes and next(iter(config.outputs), "") != LOGITS:
        problems.append(f"it has class names, but its first output is not '{LOGITS}'.")
    if LOGITS in config.outputs and config.outputs[LOGITS] != len(config.classes):
        problems.append(f"it has {config.outputs[LOGITS]} logits for {len(config.classes)} class names.")
    for name, value in config.graph_metadata().items():
        found = session.metadata.get(name)
        if found != value:
            problems.append(f"the graph's metadata says {name} = {found}, {CONFIG} says {value}.")
    return problems
