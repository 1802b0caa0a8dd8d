"""Which node of an exported graph is the first to compute something else than PyTorch. Needs torch.

PyTorch's dynamo exporter names the values of an ONNX graph after the operations of the program that
torch.export records, so that most values can be compared by name, in float64, one after the other. Where
its optimiser fused operations, names vanish; what is left between the last value that agrees and the first
that departs is named. A graph of the TorchScript exporter is compared with a fresh one by the same exporter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import torch

from tldist.export.dataflow import Dataflow, module_of
from tldist.export.departure import Departure, finite
from tldist.export.graph import ExportGraph
from tldist.export.onnx_values import LEVELS, Graph, find_difference, run_at, run_values
from tldist.export.picture import FITTED
from tldist.export.program import (
    Program,
    Value,
    export_by_torchscript,
    module_values,
    ops_of,
    record,
    results_of_modules,
    run_program,
    values_of,
)
from tldist.progress import warn
from tldist.runtime.reference import SLACK
from tldist.runtime.session import CPU, Session

NODE_TOLERANCE = 1e-5
"""Relative error at which a value of a float32 graph departs, where PyTorch's own error is smaller."""
_SHARE = 0.5
"""Of a graph's values that must have PyTorch's names; else it comes from another exporter."""


def bisect(
    graph: ExportGraph,
    model: Path | onnx.ModelProto,
    images: np.ndarray,
    *,
    tolerance: float = NODE_TOLERANCE,
    session: Session | None = None,
    program: Program | None = None,
) -> Departure | None:
    """Find the first node whose output departs from PyTorch's.

    Args:
        graph: what was exported, in evaluation mode.
        model: the ONNX graph.
        images: uint8 (N, H, W, 3) on which the two disagree; one is enough, and fastest.
        tolerance: relative error of a value that is none; wider for lower precisions.
        session: the graph as it is deployed, if that is in doubt too.
        program: what `record` made of the module before, which takes most of the time; None: anew.

    Returns:
        The departure, or None where every value agrees.
    """
    package = Graph.open(model)
    # A graph that resizes pictures: its network is given what it makes of them.
    provider = session.provider if session else CPU
    pictures = FITTED in package.values()
    pixels = _run(package, [FITTED], images, provider)[FITTED] if pictures else images
    fresh, expected, departure = _ask_pytorch(graph, package, pixels, tolerance, program)
    if departure is None:
        found = _run(package, expected, images, provider)
        departure = _graph_departure(package, fresh, expected, found, tolerance)
    if departure is None and session is not None:
        departure = _session_departure(package, expected, images, tolerance, session)
    return departure


def _run(package: Graph, names: Collection[str], images: np.ndarray, provider: str) -> dict[str, np.ndarray]:
    """The values of a graph without optimisation: on the CPU, or where its types are not made for one."""
    try:
        return run_values(package, names, images)
    except Exception:  # ONNX Runtime's own classes have no common base: no bfloat16 on the CPU, for one
        if provider == CPU:
            raise
        return run_values(package, names, images, provider=provider)


def _ask_pytorch(
    graph: ExportGraph, package: Graph, images: np.ndarray, tolerance: float, program: Program | None
) -> tuple[Graph | None, dict[str, Value], Departure | None]:
    """A fresh export, the values that the package should have, and whether the program itself departs."""
    wanted, network = package.values(), package.values_of_network()
    try:
        program = program or record(graph, package.proto, images)
    except Exception as error:  # whatever the exporter raises, the other one is left
        warn(f"the dynamo exporter cannot export it again: {str(error).splitlines()[0]}")
    else:
        expected = values_of(program, graph.outputs, images, wanted)
        if _are_known(network, expected):
            departure = _program_departure(graph, program, images, tolerance)
            return Graph(program.proto), expected, departure
    fresh = Graph(export_by_torchscript(graph, package.proto, images))
    values = run_values(fresh, set(fresh.values()) & set(wanted), images)
    expected = {name: Value(value.astype(np.float64), 0.0) for name, value in values.items()}
    # A graph of neither exporter can be compared at its outputs; its nodes have nothing to be compared with.
    return fresh if _are_known(network, expected) else None, expected, None


def _are_known(network: list[str], expected: Mapping[str, Value]) -> bool:
    """Whether a graph's values have the names of what they are compared with."""
    return sum(name in expected for name in network) >= _SHARE * len(network)


def _program_departure(
    graph: ExportGraph, program: Program, images: np.ndarray, tolerance: float
) -> Departure | None:
    """Where what was recorded is something else than the module computes: the first module that differs."""
    results = results_of_modules(program)
    modules, found = module_values(graph, images)
    asked = {*graph.outputs, *results.values()}
    recorded = run_program(program, graph.outputs, images, asked, torch.float32)
    if not any(_departs(Value(found[name], 0.0), recorded.get(name), tolerance) for name in graph.outputs):
        return None
    order = {name: place for place, name in enumerate(recorded)}
    ops, names = ops_of(program), {path: name for path, name in results.items() if path in modules}
    names |= {name: name for name in graph.outputs}
    values = modules | found
    for path, name in sorted(names.items(), key=lambda item: order.get(item[1], len(order))):
        value = Value(values[path], 0.0)
        if _departs(value, recorded.get(name), tolerance):
            place = path if path in modules else ""
            return _describe(
                "program", name, name, ops.get(name, ""), place, value, recorded[name], tolerance
            )
    return None


def _graph_departure(
    package: Graph,
    fresh: Graph | None,
    expected: Mapping[str, Value],
    found: Mapping[str, np.ndarray],
    tolerance: float,
) -> Departure | None:
    """The first value of the ONNX graph that departs, and the node that computes it."""
    flow = Dataflow(package.proto)
    known = [name for name in package.values() if _comparable(expected.get(name), found.get(name))]
    wrong = [name for name in known if _departs(expected[name], found[name], tolerance)]
    outputs = {value.name for value in package.proto.graph.output}
    if not outputs.intersection(wrong):
        return None  # whatever differs inside, the answers are right
    value = next(name for name in wrong if name in outputs or _spreads(flow, name, known, set(wrong)))
    node = flow.writer[value]
    before, between = flow.nearest_before(value, known)
    departure = _describe(
        "graph", value, node.name, node.op_type, module_of(node), expected[value], found[value], tolerance
    )
    return replace(
        departure,
        agrees=before[0] if before else "",
        between=tuple(f"{node.name} ({node.op_type})" for node in between),
        why=find_difference(package, fresh, [node, *between]) if fresh else "",
    )


def _spreads(flow: Dataflow, name: str, known: list[str], wrong: set[str]) -> bool:
    """Whether a departure goes on. Where it does not, the value only has the name of something else: a fused
    convolution may be called after the one it was before."""
    return any(after in wrong for after in flow.nearest_after(name, known))


def _session_departure(
    package: Graph, expected: Mapping[str, Value], images: np.ndarray, tolerance: float, session: Session
) -> Departure | None:
    """Where the graph is right, but ONNX Runtime's optimisation or provider computes something else."""
    found = session.run(images)
    for name, value in found.items():
        if name in expected and _departs(expected[name], value, tolerance):
            level = next(
                (
                    level
                    for level in LEVELS
                    if _departs(
                        expected[name], run_at(package, level, session.provider, images)[name], tolerance
                    )
                ),
                "",
            )
            departure = _describe("session", name, "", "", "", expected[name], value, tolerance)
            where = (
                f"optimisation level {level} on" if level else "something else than its optimisation level,"
            )
            return replace(
                departure,
                why=f"without optimisation it agrees; from {where} {session.provider} it departs",
            )
    return None


def _comparable(expected: Value | None, found: np.ndarray | None) -> bool:
    if expected is None or found is None or expected.exact.shape != found.shape or not found.size:
        return False
    return all(np.issubdtype(kind, np.floating) for kind in (expected.exact.dtype, found.dtype))


def _departs(expected: Value, found: np.ndarray | None, tolerance: float) -> bool:
    """Whether a value is farther off than ``tolerance`` and than PyTorch's own error explains."""
    if found is None or expected.exact.shape != found.shape:
        return True
    if not (np.isfinite(found).all() and np.isfinite(expected.exact).all()):
        return bool((np.isfinite(found) != np.isfinite(expected.exact)).any())
    error = np.abs(found.astype(np.float64) - expected.exact).max(initial=0.0)
    return bool(error > max(tolerance, SLACK * expected.own_error) * _magnitude(expected))


def _magnitude(expected: Value) -> float:
    finite_part = np.abs(expected.exact[np.isfinite(expected.exact)])
    return max(float(finite_part.max(initial=0.0)), float(np.finfo(np.float32).tiny))


def _describe(
    stage: Literal["graph", "session", "program"],
    value: str,
    node: str,
    op: str,
    module: str,
    expected: Value,
    found: np.ndarray,
    tolerance: float,
) -> Departure:
    """A departure at the position of its largest error, NaN and infinity first."""
    error = np.abs(found.astype(np.float64) - expected.exact)
    position = np.unravel_index(int(np.nan_to_num(error, nan=np.inf).argmax()), error.shape)
    one, other, gap = float(expected.exact[position]), float(found[position]), float(error[position])
    return Departure(
        stage=stage,
        value=value,
        node=node,
        op=op,
        module=module,
        position=tuple(int(place) for place in position),
        expected=finite(one),
        found=finite(other),
        relative=finite(gap / _magnitude(expected)),
        tolerance=max(tolerance, SLACK * expected.own_error),
        shown=(f"{one:.7g}", f"{other:.7g}"),
    )
