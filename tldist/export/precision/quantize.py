"""Static int8 in QDQ form, by ONNX Runtime's quantiser: ranges from images once, then any number of graphs.

The ranges are measured once; each choice of layers to leave in float32 is then a graph of its own within a
second. ``quant_pre_process`` is not used: on graphs of the dynamo exporter it changed nothing but hard-swish,
which is rewritten here (and it moves the transposition that `integer_input` looks for).
"""

from __future__ import annotations

import copy
import logging
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, create_calibrator
from onnxruntime.quantization.calibrate import TensorData, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from tldist.export.precision.graphs import (
    WEIGHTED,
    add_constant,
    attribute,
    checked,
    copy_of,
    front_nodes,
    initializers,
    producers,
    set_nodes,
)
from tldist.export.precision.integer_forms import with_integer_gates
from tldist.export.precision.integer_input import PIXELS, PREFIX, SHIFTED, IntegerInput
from tldist.export.profile import Quantization
from tldist.progress import progress_bar, warn
from tldist.runtime.session import CPU

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
BETWEEN = (
    *("Add", "Mul", "Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Concat"),
    *("MaxPool", "AveragePool", "GlobalAveragePool", "Reshape", "Transpose", "Flatten", "Squeeze"),
)
"""What is quantised between convolutions, so that values stay int8 from one to the next."""
_REQUANTIZED = ("Conv", "ConvTranspose", "Gemm")
TENSORRT = "TensorrtExecutionProvider"

_TYPES = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
_BATCH = 4
"""Images at once while calibrating: all values inside the graph are in memory for them."""


@dataclass(frozen=True)
class Plan:
    """What is quantised, and how.

    Attributes:
        proto: float32, rewritten for int8.
        ranges: of every value inside it.
        how: of the profile.
        provider: that will run it.
        border: the normalisation, where it is done in whole numbers.
        gates: whether hard-sigmoids are written as integer additions.
    """

    proto: onnx.ModelProto
    ranges: TensorsData
    how: Quantization
    provider: str
    border: IntegerInput | None = None
    gates: bool = False
    types: tuple[str, ...] = field(default=())


def operator_types(proto: onnx.ModelProto) -> tuple[str, ...]:
    """The operators that are quantised.

    Between layer norms (transformers) only matrix products gain: the residual stream has outliers that eight
    bits cannot hold.
    """
    weighted = tuple(sorted(WEIGHTED - {"Einsum", "Attention"}))
    is_transformer = any(node.op_type == "LayerNormalization" for node in proto.graph.node)
    return weighted if is_transformer else (*weighted, *BETWEEN)


class _Reader(CalibrationDataReader):
    """One batch of images, as ONNX Runtime's calibrators ask for it."""

    def __init__(self, source: str, images: np.ndarray) -> None:
        self.fed: dict[str, np.ndarray] | None = {source: images}

    def get_next(self) -> dict[str, np.ndarray] | None:
        fed, self.fed = self.fed, None
        return fed


def calibrate(proto: onnx.ModelProto, how: Quantization, images: np.ndarray) -> TensorsData:
    """The range of every value inside a graph, over images that are run a few at a time.

    Args:
        proto: float32, with names and types.
        how: method and percentile.
        images: uint8 (N, H, W, 3).
    """
    symmetric = how.activation == "int8"
    options: dict[str, Any] = {"symmetric": symmetric}
    if how.method == "percentile":
        options["percentile"] = how.percentile
    with tempfile.TemporaryDirectory() as folder, _quiet():
        onnx.save_model(proto, Path(folder) / "float.onnx")
        calibrator = create_calibrator(
            Path(folder) / "float.onnx",
            [],
            augmented_model_path=str(Path(folder) / "observed.onnx"),
            calibrate_method=METHODS[how.method],
            extra_options=options,
        )
        with progress_bar(len(images), "image", "calibrating", keep=False) as bar:
            for at in range(0, len(images), _BATCH):
                part = images[at : at + _BATCH]
                calibrator.collect_data(_Reader(proto.graph.input[0].name, part))
                bar.update(len(part))
        return calibrator.compute_data()


def quantize(plan: Plan, exclude: frozenset[str] = frozenset(), *, explicit: bool = False) -> onnx.ModelProto:
    """The int8 graph.

    Args:
        plan: what is quantised, and how.
        exclude: names of nodes that stay float32, beside those of the profile and the normalisation.
        explicit: leave Relu, Clip and hard-sigmoids in the graph as they are: to look at, not to ship.

    Raises:
        ModelError: the quantiser wrote a graph that is not valid.
    """
    proto, how = copy_of(plan.proto), plan.how
    ranges = copy.deepcopy(plan.ranges)  # the quantiser narrows those before a Relu
    options: dict[str, Any] = {
        "MatMulConstBOnly": True,
        # Logits of 256 levels would tie; the last product gives float32, and its kernel does so for nothing.
        "OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"],
        "ActivationSymmetric": how.activation == "int8",
        "QDQKeepRemovableActivations": explicit,
    }
    if plan.provider == TENSORRT:  # it wants a pair of its own at every weight and reader, and float32 biases
        options |= {"AddQDQPairToWeight": True, "DedicatedQDQPair": True, "QuantizeBias": False}
    for node in proto.graph.node:  # what pooling left in between has the range of what it hands on
        if node.op_type == "Flatten" and node.input[0] not in ranges and node.output[0] in ranges:
            ranges.data[node.input[0]] = ranges[node.output[0]]
    if plan.border:
        options["TensorQuantOverrides"] = {
            SHIFTED: [{"rmin": np.float32(plan.border.low), "rmax": np.float32(plan.border.high)}]
        }
        for name in (PIXELS, SHIFTED, f"{PREFIX}images", f"{PREFIX}normal"):
            ranges.data[name] = _range(plan.border.low, plan.border.high)
    with _quiet():
        quantizer = QDQQuantizer(
            proto,
            how.per_channel,
            how.reduce_range,
            QuantType.QInt8,
            _TYPES[how.activation],
            ranges,
            [],
            sorted(exclude | _never(plan)),
            list(plan.types or operator_types(proto)),
            options,
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
    made = _with_float_weights_kept(quantizer.model.model)
    if plan.gates and not explicit:
        made, _ = with_integer_gates(made)
    del made.metadata_props[:]
    made.metadata_props.extend(plan.proto.metadata_props)
    return checked(made, "int8")


def quantizable(plan: Plan) -> tuple[onnx.NodeProto, ...]:
    """The nodes that `quantize` quantises if none is excluded."""
    types, never = set(plan.types or operator_types(plan.proto)), _never(plan)
    return tuple(n for n in plan.proto.graph.node if n.op_type in types and n.name not in never)


def warn_about_saturation(how: Quantization, provider: str) -> None:
    """Say so where this x86 machine lacks the instructions that int8 of full range needs."""
    info = Path("/proc/cpuinfo")
    if how.reduce_range or provider != CPU or platform.machine() not in ("x86_64", "AMD64"):
        return
    if info.is_file() and not {"avx512_vnni", "avx_vnni"} & set(info.read_text().split()):
        warn(
            "this CPU has no VNNI: its int8 products may saturate at 16 bits, and are slower. "
            "Set quantization.reduce_range: true in the profile if the machines that serve have none either."
        )


def _range(low: float, high: float) -> TensorData:
    return TensorData(lowest=np.float32(low), highest=np.float32(high))


def _never(plan: Plan) -> set[str]:
    """Nodes that are never quantised: the profile's, and the normalisation but for its integer addition."""
    named = set(plan.how.exclude)
    by_profile = {n.name for n in plan.proto.graph.node if n.name in named or n.op_type in named}
    own = {n.name for n in plan.proto.graph.node if any(name.startswith(PREFIX) for name in n.output)}
    return by_profile | (front_nodes(plan.proto) - own)


def _with_float_weights_kept(proto: onnx.ModelProto) -> onnx.ModelProto:
    """What was left in float32 stays so when ONNX Runtime loads it.

    Its optimiser (WeightBiasQuantization, seen in 1.31) rounds the float32 weights of a convolution between
    DequantizeLinear and QuantizeLinear to int8, with one scale for all channels: worse than what was left
    out. It looks for an input with a single scale; so these nodes get a DequantizeLinear of their own, with
    the same scale once a channel.
    """
    made_by, constants = producers(proto), initializers(proto)
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        source = made_by.get(node.input[0]) if node.op_type in _REQUANTIZED else None
        if source is not None and source.op_type == "DequantizeLinear" and node.input[1] in constants:
            name, count = f"{node.name}.input", _input_channels(node, constants[node.input[1]])
            values = [numpy_helper.to_array(constants[one]) for one in source.input[1:3]]
            tiled = [
                add_constant(proto, f"{name}.{what}", np.full(count, value, value.dtype))
                for what, value in zip(("scale", "zero"), values)
            ]
            inputs = [source.input[0], *tiled]
            nodes.append(helper.make_node("DequantizeLinear", inputs, [f"{name}.value"], name, axis=1))
            node.input[0] = f"{name}.value"
        nodes.append(node)
    set_nodes(proto, nodes)
    return proto


def _input_channels(node: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    """The size of axis 1 of what a node with this weight reads."""
    if node.op_type == "Gemm":
        return int(weight.dims[1 if attribute(node, "transB", 0) else 0])
    group = attribute(node, "group", 1)
    assert isinstance(group, int)
    return int(weight.dims[0] if node.op_type == "ConvTranspose" else weight.dims[1] * group)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser recommends its own pre-processing on the root logger, each time."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
