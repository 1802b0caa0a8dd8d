"""From the module to an ONNX graph: by PyTorch's exporters, none of which is taken at its word."""

from __future__ import annotations

import io
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import onnx
import onnxscript  # noqa: F401 - the dynamo exporter needs it, and says so too late
import torch

from tldist.errors import CheckFailed, ModelError
from tldist.export.conversion_check import graph_fault, picture_fault, structure_fault
from tldist.export.graph import ExportGraph, check_free_size
from tldist.export.onnx_file import opset_of, tidy
from tldist.export.picture import take_pictures
from tldist.models.chain import Chain, folded
from tldist.runtime.package import FEATURES, MODEL
from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.session import INPUT

Exporter = Literal["auto", "dynamo", "torchscript"]


@dataclass(frozen=True)
class Converted:
    """An ONNX graph, and how it came to be.

    Attributes:
        proto: the graph.
        exporter: ``dynamo`` or ``torchscript``.
        opset: version of ONNX's operators that it uses.
        refused: (exporter, reason) of those that were tried before.
        versions: of the libraries that made it.
    """

    proto: onnx.ModelProto = field(repr=False)
    exporter: str
    opset: int
    refused: tuple[tuple[str, str], ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data, without the graph."""
        refused = [{"exporter": name, "reason": reason} for name, reason in self.refused]
        return {
            "name": self.exporter,
            "opset": self.opset,
            "refused": refused,
            "versions": dict(self.versions),
        }


def by_dynamo(graph: ExportGraph, opset: int | None) -> onnx.ModelProto:
    """Export what `torch.export` captures (its optimiser folds constants and BatchNorm)."""
    free: dict[int, Any] = {0: torch.export.Dim("batch", min=1)}
    if graph.input == "dynamic":
        free = {0: "batch", 1: "height", 2: "width"}
    program = torch.onnx.export(
        graph,
        (graph.example(),),
        dynamo=True,
        verbose=False,
        opset_version=opset,
        input_names=[INPUT],
        output_names=list(graph.outputs),
        dynamic_shapes=(free,),
    )
    assert program is not None  # dynamo=True returns a program
    proto: onnx.ModelProto = program.model_proto
    return proto


def by_torchscript(graph: ExportGraph, opset: int | None) -> onnx.ModelProto:
    """Export what a run with an example traces: deprecated, but it knows operators that dynamo does not."""
    free = {0: "batch", 1: "height", 2: "width"} if graph.input == "dynamic" else {0: "batch"}
    with tempfile.TemporaryDirectory(prefix="tldist-") as folder:
        path = str(Path(folder) / MODEL)  # not memory, nor a Path: only so it takes more than 2 GiB
        torch.onnx.export(
            graph,
            (graph.example(),),
            path,
            dynamo=False,
            verbose=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=list(graph.outputs),
            dynamic_axes={INPUT: free, **{name: {0: "batch"} for name in graph.outputs}},
        )
        return onnx.load(path)


EXPORTERS: Mapping[str, Callable[[ExportGraph, int | None], onnx.ModelProto]] = {
    "dynamo": by_dynamo,
    "torchscript": by_torchscript,
}
"""In the order in which ``auto`` tries them."""


def convert(
    graph: ExportGraph,
    opset: int | None,
    exporter: Exporter = "auto",
    check: Callable[[onnx.ModelProto], str] | None = None,
) -> Converted:
    """Export, with any batch size, by the first exporter whose graph is right.

    A graph is right if its structure is (`onnx.checker`; free batch; it loads in ONNX Runtime) and it answers
    what the module answers, on the CPU, at every batch and image size that is tried; and if ``check`` agrees.

    Args:
        graph: in evaluation mode. One that takes whole pictures is exported without its resize, which
            `resize_inside` puts in front.
        opset: of ONNX's operators; None: the exporter's default.
        exporter: which one; ``auto``: dynamo, and where it fails or is wrong, TorchScript.
        check: from a graph to what is wrong with it, in words; empty: nothing.

    Raises:
        ModelError: no exporter can do it, or the input's size cannot be free; names all reasons.
        CheckFailed: every exporter's graph answers something else than the module.
    """
    graph = _folded(graph)
    if graph.input == "dynamic":
        check_free_size(graph)
    refused: list[tuple[str, str]] = []
    only_values = True
    for name in EXPORTERS if exporter == "auto" else (exporter,):
        proto, fault, values = _tried(EXPORTERS[name], graph, opset)
        if proto is not None and not fault and check:
            fault, values = check(proto), True
        if proto is not None and not fault:
            return Converted(proto, name, opset_of(proto), tuple(refused), _versions())
        refused.append((name, fault))
        only_values &= values
        del proto  # before the next one is made
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    message = f"{type(graph.model).__name__} cannot be exported to ONNX: {reasons}"
    raise CheckFailed(message) if only_values else ModelError(message)


def _tried(
    export: Callable[[ExportGraph, int | None], onnx.ModelProto], graph: ExportGraph, opset: int | None
) -> tuple[onnx.ModelProto | None, str, bool]:
    """What an exporter makes of the module: the graph, its fault, and whether that is about values."""
    try:
        with quiet():
            proto = export(graph, opset)
    except Exception as error:  # the exporters wrap whatever the module raises
        return None, _reason(error), False
    tidy(proto, graph.widths())
    if fault := structure_fault(graph, proto, opset):
        return proto, fault, False
    return proto, *graph_fault(graph, proto)


def _folded(graph: ExportGraph) -> ExportGraph:
    """With the affine transforms of a chain folded into their neighbours, where its features are not asked
    for: what the head reads is other features then."""
    if not isinstance(graph.model, Chain) or any(name.startswith(FEATURES) for name in graph.outputs):
        return graph
    same = ExportGraph(
        folded(graph.model), graph.how, graph.outputs, graph.temperature, graph.task, input=graph.input
    )
    return same.eval()


def resize_inside(proto: onnx.ModelProto, how: Preprocessing) -> None:
    """Let a graph that takes images of one size take whole pictures of any: changes ``proto``.

    Raises:
        ModelError: the resize is not that of training.
    """
    take_pictures(proto, how)
    if fault := picture_fault(proto, how):
        raise ModelError(f"the graph cannot take whole pictures: {fault}.")


def _reason(error: BaseException) -> str:
    """The first line of what was raised first."""
    text = str(error.__cause__ or error).strip() or type(error).__name__
    return re.sub(r"\x1b\[[0-9;]*m", "", text.splitlines()[0])[:300]


def _versions() -> dict[str, str]:
    return {library: version(library) for library in ("torch", "onnx", "onnxscript")}


@contextmanager
def quiet() -> Iterator[None]:
    """The exporters tell their story by warnings, logging and print; what counts is in the error."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            _closed_outlet(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def _closed_outlet() -> Iterator[None]:
    """Where the TorchScript exporter fails, its C++ prints the graph to the process's own standard output."""
    kept = os.dup(1)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
