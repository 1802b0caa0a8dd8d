"""Whether a freshly converted graph is right: its structure, its free sizes, and what it answers.

An exporter can write a graph that loads and answers something else (pytorch#169178: a ResNet-18 of 0 %
accuracy), so none is taken at its word. This is the quick look that decides between exporters; parity, on the
samples and the provider of the package, comes after it.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
from PIL import Image

from tldist.errors import TldistError
from tldist.export.compare import FLOOR
from tldist.export.graph import ExportGraph, other_sizes, run_graph
from tldist.export.groups import relative_error
from tldist.export.natural import extreme_images, natural_images
from tldist.export.onnx_file import opset_of, written
from tldist.export.picture import FITTED, fit_graph
from tldist.runtime.preprocess import Preprocessing, fit
from tldist.runtime.reference import SLACK
from tldist.runtime.session import INPUT, Session, open_session

NEAR = 1e-3
"""A graph whose error, relative to the largest value, is below this has no wrong node in it."""
BATCHES = (1, 9)
"""The last one is all images: black, white, five of noise, two like photographs."""


def structure_fault(graph: ExportGraph, proto: onnx.ModelProto, opset: int | None) -> str:
    """What is wrong with a graph before it runs; empty: nothing."""
    if opset is not None and opset_of(proto) != opset:
        return f"opset {opset} was asked for, and it uses {opset_of(proto)}"
    given = tuple(value.name for value in proto.graph.output)
    if given != graph.outputs or [value.name for value in proto.graph.input] != [INPUT]:
        return f"its outputs are {given}, expected {graph.outputs}"
    for value in (*proto.graph.input, *proto.graph.output):
        if not value.type.tensor_type.shape.dim[0].dim_param:
            return f"its batch size is fixed at '{value.name}'; it must be free"
    sides = [bool(side.dim_param) for side in proto.graph.input[0].type.tensor_type.shape.dim[1:3]]
    if graph.input == "dynamic" and not all(sides):
        return "its height or width came out fixed; both must be free"
    return ""


def graph_fault(graph: ExportGraph, proto: onnx.ModelProto) -> tuple[str, bool]:
    """What is wrong with a graph that takes images, found by checking its file and by running it on the CPU.

    Returns:
        The fault (empty: none), and whether it is about values: the graph runs, and answers something else.
    """
    with written(proto) as path:
        if fault := _file_fault(path):
            return fault, False
        try:
            session = open_session(path, threads=1)
        except TldistError as error:
            return str(error).replace(f"{path}: ", ""), False
        try:
            if fault := _difference(graph, session, (graph.how.height, graph.how.width), BATCHES):
                return fault, True
            return (_difference_elsewhere(graph, session) if graph.input == "dynamic" else ""), False
        except Exception as error:  # ONNX Runtime's own classes have no common base
            return f"it does not run: {' '.join(str(error).split())[:300]}", False


def picture_fault(proto: onnx.ModelProto, how: Preprocessing) -> str:
    """What is wrong with a graph that takes whole pictures: its file, or how it resizes and crops."""
    with written(proto) as path:
        if fault := _file_fault(path):
            return fault
        try:
            open_session(path, threads=1)
        except TldistError as error:
            return str(error).replace(f"{path}: ", "")
    differences = {size: fit_difference(how, size, opset_of(proto)) for size in _picture_sizes(how)}
    size, largest = max(differences.items(), key=lambda pair: pair[1])
    return f"its resize is {largest} of 255 off on a picture of {size}" if largest > 1 else ""


def fit_difference(how: Preprocessing, size: tuple[int, int], opset: int) -> int:
    """The largest difference, in grey levels, between `fit` and the same in ONNX, on a picture of (H, W)."""
    picture = natural_images(1, *size)
    picture[:, ::3, ::2] = 255 - picture[:, ::3, ::2]  # edges, where cubic weights overshoot
    front = fit_graph(how)
    model = onnx.helper.make_model(front, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)
    import onnxruntime  # two distributions bring it under one name

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run([FITTED], {INPUT: picture})
    expected = fit(Image.fromarray(picture[0]), how)
    return int(np.abs(found[0].astype(int) - expected.astype(int)).max())


def _picture_sizes(how: Preprocessing) -> tuple[tuple[int, int], ...]:
    """Landscape and portrait, larger and smaller than the crop, odd."""
    height, width = how.height, how.width
    return (2 * height + 1, 3 * width), (3 * height, 2 * width + 1), (height // 2 + 1, width // 2 + 2)


def _file_fault(path: Path) -> str:
    try:
        onnx.checker.check_model(path, full_check=True)
    except Exception as error:  # the checker's own, and those of shape inference
        return f"its structure is wrong: {' '.join(str(error).split())[:300]}"
    return ""


def _difference_elsewhere(graph: ExportGraph, session: Session) -> str:
    """Where a graph whose height and width are free differs from the module at other sizes; or nothing."""
    larger, smaller = other_sizes(graph)
    for size in (*larger, *smaller):
        try:
            run_graph(graph, np.zeros((1, *size, 3), np.uint8))
        except Exception:  # whatever the module raises
            if size in larger:
                raise
            continue  # too small for this network, in PyTorch too
        if fault := _difference(graph, session, size, (1, 2)):
            return f"{fault}, though it is right at {graph.how.height}x{graph.how.width}"
    return ""


def _difference(graph: ExportGraph, session: Session, size: tuple[int, int], batches: tuple[int, ...]) -> str:
    """Where the graph's answers to images of (H, W) differ from the module's; or nothing."""
    images = np.concatenate([*extreme_images(*size).values(), natural_images(2, *size)])[-max(batches) :]
    expected = run_graph(graph, images)
    referee: dict[str, np.ndarray] = {}
    for count in batches:
        for name, values in session.run(images[:count]).items():
            wanted = expected[name][:count]
            where = f"'{name}' at batch {count} of {size[0]}x{size[1]} pixels"
            if values.shape != wanted.shape:
                return f"{where} has shape {values.shape}, PyTorch's {wanted.shape}"
            if not np.isfinite(wanted).all():
                continue  # no exporter's fault; parity says it
            if not np.isfinite(values).all():
                return f"{where} is NaN or infinite"
            if (error := _error(wanted, values)) > NEAR:
                referee = referee or _in_float64(graph, images)
                # Of all images: where PyTorch is far from itself on one, so it may be on any other.
                own = _error(referee[name], expected[name]) if referee else 0.0
                if error > SLACK * own:
                    return f"{where} differs from PyTorch's by {error:.1e} of the largest value"
    return ""


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest error of an image, relative to the largest of its values: images are of unlike size."""
    least = max(FLOOR * float(np.abs(expected).max()), 1e-12)
    pairs = zip(expected, found)
    return max(relative_error(one, other, max(float(np.abs(one).max()), least)) for one, other in pairs)


def _in_float64(graph: ExportGraph, images: np.ndarray) -> dict[str, np.ndarray]:
    try:
        return run_graph(copy.deepcopy(graph).double(), images)
    except RuntimeError:  # code of one's own may insist on float32
        return {}
