"""What PyTorch computes inside a model: the value of every operation of its program. Needs torch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.utils._pytree import tree_map

from tldist.export.converter import quiet
from tldist.export.graph import ExportGraph
from tldist.export.picture import FITTED
from tldist.runtime.package import MODEL
from tldist.runtime.session import INPUT


@dataclass(frozen=True)
class Value:
    """One intermediate value.

    Attributes:
        exact: of PyTorch in float64, or in float32 where float64 does not run.
        own_error: of PyTorch in float32, relative to the largest absolute value; 0 where not known.
    """

    exact: np.ndarray
    own_error: float


@dataclass(frozen=True)
class Program:
    """A model as torch.export recorded it, and the ONNX graph that PyTorch makes of it.

    Attributes:
        exported: the program, in the operations that the ONNX graph's values are named after.
        proto: the graph.
    """

    exported: torch.export.ExportedProgram
    proto: onnx.ModelProto


def record(graph: ExportGraph, like: onnx.ModelProto, images: np.ndarray) -> Program:
    """Export a graph afresh by the dynamo exporter, with the free axes and operator set of another one.

    Args:
        graph: the module.
        like: the ONNX graph that it will be compared with.
        images: uint8 (N, H, W, 3).
    """
    # A batch of 1 would be recorded as a constant.
    example = torch.from_numpy(np.resize(images, (max(2, len(images)), *images.shape[1:])))
    with quiet():
        program = torch.onnx.export(
            graph,
            (example,),
            dynamo=True,
            verbose=False,
            opset_version=max(18, *_opsets(like)),
            input_names=[INPUT],
            output_names=list(graph.outputs),
            dynamic_shapes=(_free_axes(like),),
        )
    assert program is not None  # dynamo=True returns a program
    assert program.exported_program is not None  # it was exported, not loaded
    return Program(program.exported_program, program.model_proto)


def export_by_torchscript(graph: ExportGraph, like: onnx.ModelProto, images: np.ndarray) -> onnx.ModelProto:
    """Export afresh by the TorchScript exporter, with the free axes and operator set of another graph."""
    example = torch.from_numpy(np.resize(images, (max(2, len(images)), *images.shape[1:])))
    free = dict(zip(_free_axes(like), ("batch", "height", "width")))
    with tempfile.TemporaryDirectory(prefix="tldist-") as folder, quiet():
        path = Path(folder) / MODEL  # a file, not memory: beyond 2 GiB it writes the weights beside it
        torch.onnx.export(
            graph,
            (example,),
            path,
            dynamo=False,
            opset_version=max(_opsets(like), default=18),
            input_names=[INPUT],
            output_names=list(graph.outputs),
            dynamic_axes={INPUT: free, **{name: {0: "batch"} for name in graph.outputs}},
        )
        return onnx.load(path)


def _opsets(like: onnx.ModelProto) -> list[int]:
    return [entry.version for entry in like.opset_import if entry.domain in ("", "ai.onnx")]


def _free_axes(like: onnx.ModelProto) -> dict[int, Any]:
    """As the exported module's: a graph that takes whole pictures has a network of one size inside."""
    dims = like.graph.input[0].type.tensor_type.shape.dim
    if dims[1].dim_value or any(FITTED in node.output for node in like.graph.node):
        return {0: torch.export.Dim("batch", min=1)}
    return {0: "batch", 1: "height", 2: "width"}


def values_of(
    program: Program, outputs: Collection[str], images: np.ndarray, wanted: Collection[str]
) -> dict[str, Value]:
    """The wanted values by name; those of the outputs by the outputs' names.

    Args:
        program: the model.
        outputs: names, in order.
        images: uint8 (N, H, W, 3).
        wanted: names of values.
    """
    single = run_program(program, outputs, images, wanted, torch.float32)
    try:
        double = run_program(program, outputs, images, wanted, torch.float64)
    except RuntimeError:  # a program may hold constants that insist on float32
        return {name: Value(value, 0.0) for name, value in single.items()}
    return {
        name: Value(value, _relative(value, single[name])) for name, value in double.items() if name in single
    }


def _relative(exact: np.ndarray, rounded: np.ndarray) -> float:
    if not exact.size or exact.shape != rounded.shape:
        return 0.0
    magnitude = max(float(np.abs(exact).max()), float(np.finfo(np.float32).tiny))
    return float(np.nan_to_num(np.abs(exact - rounded).max() / magnitude))


@torch.no_grad()
def run_program(
    program: Program,
    outputs: Collection[str],
    images: np.ndarray,
    wanted: Collection[str],
    dtype: torch.dtype,
) -> dict[str, np.ndarray]:
    """Run a program, all its float32 arithmetic in ``dtype``; the wanted values by name."""
    exported = program.exported
    constants = {**exported.state_dict, **exported.constants}
    inputs = [
        torch.from_numpy(images) if spec.kind == InputKind.USER_INPUT else constants[str(spec.target)]
        for spec in exported.graph_signature.input_specs
    ]
    recorder = _Recorder(exported.graph_module, wanted, dtype)
    given = [tree_map(recorder.cast, value) for value in inputs]
    answers = recorder.run(*given, enable_io_processing=False)
    return recorder.found | {
        name: _array(value) for name, value in zip(outputs, answers) if isinstance(value, Tensor)
    }


class _Recorder(Interpreter):
    """Runs a program and keeps the values that are wanted."""

    def __init__(self, module: torch.fx.GraphModule, wanted: Collection[str], dtype: torch.dtype) -> None:
        super().__init__(module)
        self.wanted, self.dtype = frozenset(wanted), dtype
        self.found: dict[str, np.ndarray] = {}

    def cast(self, value: Any) -> Any:
        """float32 tensors, and float32 where it is asked for, become ``dtype``."""
        if value is torch.float32:
            return self.dtype
        if isinstance(value, Tensor) and value.dtype == torch.float32:
            return value.to(self.dtype)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(target, tree_map(self.cast, args), tree_map(self.cast, kwargs))

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, Tensor):
            self.found[n.name] = _array(value)
        return value


def _array(value: Tensor) -> np.ndarray:
    array: np.ndarray = value.detach().cpu().numpy()
    return array


def ops_of(program: Program) -> dict[str, str]:
    """The operation of each value, by name."""
    return {
        node.name: str(node.target) for node in program.exported.graph.nodes if node.op == "call_function"
    }


def results_of_modules(program: Program) -> dict[str, str]:
    """For each module path, the name of the last value that was recorded inside it: its result."""
    results: dict[str, str] = {}
    for node in program.exported.graph.nodes:
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            results[path] = node.name
    return results


@torch.no_grad()
def module_values(
    graph: ExportGraph, images: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What each module inside a graph returns when it runs as it is, by path, of those that run once; and
    what the graph returns, by output."""
    found: dict[str, np.ndarray] = {}
    runs: dict[str, int] = {}
    graph = copy.deepcopy(graph)

    def keep(path: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, value: Any) -> None:
            runs[path] = runs.get(path, 0) + 1
            if isinstance(value, Tensor):
                found[path] = _array(value).copy()  # an operation in place may follow

        return hook

    for path, module in graph.named_modules():
        if path:
            module.register_forward_hook(keep(path))
    answers = dict(zip(graph.outputs, map(_array, graph(torch.from_numpy(images)))))
    return {path: value for path, value in found.items() if runs[path] == 1}, answers
