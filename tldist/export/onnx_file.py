"""ONNX graphs as files: written with their external data, read, tidied, named after modules. No torch."""

from __future__ import annotations

import ast
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnxscript import ir

from tldist.runtime.package import MODEL

LARGEST = 2**31 - 2**24
"""Bytes of weights that fit one ONNX file (protobuf's limit is 2 GiB), with room for the graph."""
SMALLEST_OUTSIDE = 1024
"""Tensors of fewer bytes stay in the graph when the others go to a file of their own: shapes among them."""
DATA = f"{MODEL}.data"
"""The file of the weights beside a graph that is too large for one file."""

_SCOPES = "pkg.torch.onnx.name_scopes"


def weight_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of a graph's weights."""
    return sum(_tensor_bytes(tensor) for tensor in proto.graph.initializer)


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    return math.ceil(math.prod(tensor.dims) * ir.DataType(tensor.data_type).itemsize)


def save(
    proto: onnx.ModelProto, path: Path, metadata: dict[str, str] | None = None, *, largest: int = LARGEST
) -> None:
    """Write a graph with what it says about itself; ``proto`` keeps its weights.

    Args:
        proto: the graph. Its metadata is set.
        path: of the file to write.
        metadata: what it says about itself; None: as it is.
        largest: bytes of weights up to which one file holds all. Beyond, they go to ``NAME.data`` beside it.
    """
    if metadata is not None:
        onnx.helper.set_model_props(proto, metadata)
    if weight_bytes(proto) <= largest:
        onnx.save_model(proto, path)
        return
    # onnx_ir writes tensor by tensor out of the graph's own memory; onnx would empty the graph, or copy it.
    ir.save(
        ir.from_proto(proto),
        path,
        external_data=f"{path.name}.data",
        size_threshold_bytes=min(SMALLEST_OUTSIDE, largest),
    )


@contextmanager
def written(proto: onnx.ModelProto) -> Iterator[Path]:
    """While inside, a graph is a file."""
    with tempfile.TemporaryDirectory(prefix="tldist-") as folder:
        path = Path(folder) / MODEL
        save(proto, path)
        yield path


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a graph uses."""
    return next(int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))


def tidy(proto: onnx.ModelProto, widths: Sequence[int]) -> None:
    """Remove the exporter's notes (stack traces with this machine's paths), and name nodes after modules.

    Args:
        proto: the graph; changed.
        widths: of its outputs, which an exporter does not always know; the graph says them.
    """
    graph = proto.graph
    for output, width in zip(graph.output, widths):
        output.type.tensor_type.shape.dim[1].dim_value = width
    for node in graph.node:
        kept = [entry for entry in node.metadata_props if entry.key == _SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
        node.doc_string = ""
    for values in (graph.value_info, graph.input, graph.output, graph.initializer):
        for value in values:
            del value.metadata_props[:]
            value.doc_string = ""
    del graph.metadata_props[:]
    graph.doc_string = ""
    _name_nodes(graph)


def _name_nodes(graph: onnx.GraphProto) -> None:
    """``layer4.1.conv2/Conv``: the module's path, the operator, and a number from the second one on."""
    times: Counter[str] = Counter()
    for node in graph.node:
        path = _module_path(node)
        name = f"{path}/{node.op_type}" if path else node.op_type
        node.name = f"{name}_{times[name]}" if times[name] else name
        times[name] += 1


def _module_path(node: onnx.NodeProto) -> str:
    """The path, in the model, of the module that a node computes; empty where it is in none.

    The dynamo exporter notes the paths of all modules around it. The TorchScript exporter puts them into the
    node's name: ``/model/layer4/layer4.1/conv2/Conv``.
    """
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), None)
    if scopes is not None:
        modules = [scope for scope in ast.literal_eval(scopes)[:-1] if not scope.startswith("_")]
        path = modules[-1] if modules else ""
    else:
        path = ".".join(_parts(node.name.split("/")[1:-1]))
    return "" if path == "model" else path.removeprefix("model.")


def _parts(segments: list[str]) -> Iterator[str]:
    """``layer4, layer4.1`` are the parts ``layer4, 1``; ``members.0`` alone is a list that was not called."""
    for before, segment in zip(["", *segments], segments):
        around, _, last = segment.rpartition(".")
        yield last if around and around == before else segment
