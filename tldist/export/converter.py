"""The part of export that needs torch: the module that is exported, its answers, and its ONNX file."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnxscript  # noqa: F401 - the dynamo exporter needs it, and says so too late
import torch
from torch import Tensor, nn

from tldist.bundle import BundleConfig, Task
from tldist.errors import ModelError
from tldist.models.chain import Chain, folded
from tldist.models.heads import tapped
from tldist.models.load import input_tensor, load_bundle
from tldist.progress import warn
from tldist.runtime.package import FEATURES, LOGITS, PROBABILITIES
from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.reference import Reference, Samples
from tldist.runtime.session import INPUT

_LARGEST_FILE = 2**31 - 2**24
"""Bytes of weights that fit one ONNX file (protobuf's limit is 2 GiB), with room for the graph."""
_BATCH = 16


class ExportGraph(nn.Module):
    """What is exported: uint8 images to the asked-for outputs, normalisation inside.

    Args:
        model: normalised images to logits.
        how: its preprocessing.
        outputs: names, in order.
        temperature: of the probabilities.
        task: whose probabilities they are.
    """

    def __init__(
        self,
        model: nn.Module,
        how: Preprocessing,
        outputs: Sequence[str],
        temperature: float = 1.0,
        task: Task = "multiclass",
    ) -> None:
        super().__init__()
        self.model, self.how, self.outputs = model, how, tuple(outputs)
        self.temperature, self.task = temperature, task

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 (N, H, W, 3) to one (N, D) an output, in the precision of the weights."""
        dtype = next(self.model.parameters()).dtype
        with tapped(self.model) as features:
            logits = self.model(input_tensor(images, self.how, dtype=dtype))
            found = {LOGITS: logits, FEATURES: features()}
        scaled = logits / self.temperature
        found[PROBABILITIES] = scaled.sigmoid() if self.task == "multilabel" else scaled.softmax(1)
        return tuple(found[name] for name in self.outputs)


def load_graph(
    path: Path, outputs: Sequence[str], *, trust_code: bool = False, verify: bool = True
) -> tuple[ExportGraph, BundleConfig]:
    """The module to export of a bundle, in evaluation mode, and the bundle's configuration."""
    model, config = load_bundle(path, trust_code=trust_code, verify=verify)
    graph = ExportGraph(model, config.preprocessing, outputs, config.temperature, config.task)
    return graph.eval(), config


def answer(graph: ExportGraph, samples: Samples) -> Reference:
    """PyTorch's answers to the samples, in float32 and, as the referee, in float64."""
    expected = _forward(graph, samples.images)
    try:
        referee = _forward(copy.deepcopy(graph).double(), samples.images)
    except RuntimeError as error:  # code of one's own may insist on float32
        warn(f"the model does not run in float64, so parity has no referee: {str(error).splitlines()[0]}")
        referee = {}
    return Reference(samples, {name: values.astype(np.float32) for name, values in expected.items()}, referee)


@torch.no_grad()
def _forward(graph: ExportGraph, images: np.ndarray) -> dict[str, np.ndarray]:
    parts = [graph(torch.from_numpy(images[at : at + _BATCH])) for at in range(0, len(images), _BATCH)]
    return {name: torch.cat([part[i] for part in parts]).numpy() for i, name in enumerate(graph.outputs)}


def convert(graph: ExportGraph, opset: int | None) -> onnx.ModelProto:
    """Export by the dynamo exporter, with any batch size, and check the result's structure.

    Raises:
        ModelError: the module cannot be exported, or its batch size came out fixed.
    """
    graph = _folded(graph)
    size = sum(tensor.numel() * tensor.element_size() for tensor in graph.state_dict().values())
    if size > _LARGEST_FILE:
        raise ModelError(f"the model's weights are {size:,} bytes; one ONNX file holds {_LARGEST_FILE:,}.")
    example = torch.zeros(2, graph.how.height, graph.how.width, 3, dtype=torch.uint8)
    try:
        with _quiet():
            program = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=list(graph.outputs),
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            )
    except Exception as error:  # the exporter wraps whatever the module raises
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ModelError(f"{type(graph.model).__name__} cannot be exported to ONNX: {reason}") from error
    assert program is not None  # dynamo=True returns a program
    proto: onnx.ModelProto = program.model_proto
    _strip_traces(proto)
    onnx.checker.check_model(proto, full_check=True)
    _check_batch(proto)
    return proto


def _folded(graph: ExportGraph) -> ExportGraph:
    """With the affine transforms of a chain folded into their neighbours, where its features are not asked
    for: what the head reads is other features then."""
    if not isinstance(graph.model, Chain) or FEATURES in graph.outputs:
        return graph
    same = ExportGraph(folded(graph.model), graph.how, graph.outputs, graph.temperature, graph.task)
    return same.eval()


def save(proto: onnx.ModelProto, path: Path, metadata: dict[str, str]) -> None:
    """Write a graph with what it says about itself."""
    onnx.helper.set_model_props(proto, metadata)
    onnx.save_model(proto, path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its story by warnings, logging and print; what counts is in the error it raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _strip_traces(proto: onnx.ModelProto) -> None:
    """Remove the exporter's notes (stack traces with this machine's paths); keep each node's module path."""
    for node in proto.graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    graph = proto.graph
    for values in (graph.value_info, graph.input, graph.output, graph.initializer):
        for value in values:
            del value.metadata_props[:]
    del graph.metadata_props[:]


def _check_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            raise ModelError(f"the exported graph's batch size is fixed at '{value.name}'; it must be free.")
