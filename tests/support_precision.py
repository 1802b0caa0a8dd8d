"""A small network written in ONNX, with all that int8 and half precision meet, and ways to run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

SIDE = 24
CLASSES = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Net:
    """An ONNX graph in the making."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, value: object, kind: type = np.float32) -> str:
        self.weights.append(numpy_helper.from_array(np.array(value, kind), f"c{len(self.weights)}"))
        return self.weights[-1].name

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes: object) -> str:
        name = name or f"{op.lower()}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name, **attributes))
        return f"{name}.out"

    def conv(
        self,
        value: str,
        before: int,
        after: int,
        size: int = 1,
        name: str | None = None,
        group: int = 1,
        stride: int = 1,
    ) -> str:
        fan = before // group * size**2
        weight = self.random.normal(0, np.sqrt(2 / fan), (after, before // group, size, size))
        bias = self.random.normal(0, 0.1, after)
        pads = [size // 2] * 4
        inputs = (value, self.constant(weight), self.constant(bias))
        return self.add("Conv", *inputs, name=name, group=group, strides=[stride] * 2, pads=pads)

    def normalised(self) -> str:
        value = self.add("Transpose", "images", perm=[0, 3, 1, 2])
        value = self.add("Cast", value, to=TensorProto.FLOAT)
        value = self.add("Div", value, self.constant(255.0))
        value = self.add("Sub", value, self.constant(np.reshape(MEAN, (1, 3, 1, 1))))
        return self.add("Div", value, self.constant(np.reshape(STD, (1, 3, 1, 1))))

    def pooled(self, value: str, keepdims: int = 0) -> str:
        return self.add("ReduceMean", value, self.constant([2, 3], np.int64), keepdims=keepdims)

    def proto(
        self, output: str, opset: int = 20, side: int | None = SIDE, width: int = CLASSES
    ) -> onnx.ModelProto:
        self.nodes.append(helper.make_node("Identity", [output], ["logits"], "last"))
        size = side if side else "side"
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", size, size, 3])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", width])],
            self.weights,
        )
        opsets = [helper.make_opsetid("", opset)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model


def squeeze(net: Net, value: str, channels: int) -> str:
    """A squeeze-and-excitation gate."""
    gate = net.conv(net.pooled(value, keepdims=1), channels, 4)
    gate = net.conv(net.add("Relu", gate), 4, channels)
    return net.add("Mul", value, net.add("HardSigmoid", gate, alpha=1 / 6, beta=0.5))


def body(net: Net) -> str:
    """Features (batch, 16), before the head."""
    value = net.add("HardSwish", net.conv(net.normalised(), 3, 16, 3, "stem", stride=2))
    skip = value
    value = net.add("Relu", net.conv(value, 16, 16, 3, "depthwise", group=16))
    value = net.conv(squeeze(net, value, 16), 16, 16, 1, "project")
    value = net.add("Add", value, skip)
    return net.pooled(net.add("HardSwish", net.conv(value, 16, 16, 1, "expand")))


def fitted(net: Net, features: str, opset: int = 20, spread: float = 1.0) -> onnx.ModelProto:
    """The network with a linear head that is fitted by least squares to the classes of `pictures`."""
    images, labels = pictures(200, seed=7)
    blind = Net()
    blind.nodes, blind.weights = list(net.nodes), list(net.weights)
    head = blind.add("Gemm", features, blind.constant(np.ones((16, CLASSES))), name="head")
    found = watch(blind.proto(head, opset), images, [features])[features].astype(np.float64)
    centre, scale = found.mean(0), found.std(0) + 1e-6
    wanted = np.eye(CLASSES)[labels] * 2 - 1
    design = np.c_[(found - centre) / scale, np.ones(len(found))]
    answer = np.linalg.solve(design.T @ design + 0.1 * np.eye(17), design.T @ wanted) * spread
    weight = answer[:16] / scale[:, None]
    bias = answer[16] - centre @ weight
    logits = net.add("Gemm", features, net.constant(weight), net.constant(bias), name="head")
    return net.proto(logits, opset)


def pictures(count: int, seed: int = 0, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """Images of four kinds of coloured stripes, uint8 (count, side, side, 3), and their labels."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    rows, columns = np.mgrid[:side, :side]
    images = []
    for label in labels:
        wave = np.sin((rows if label % 2 else columns) * random.uniform(0.9, 1.3) + random.uniform(0, 6))
        tint = np.array([1.0, 0.6, 0.3] if label < 2 else [0.3, 0.6, 1.0])
        image = 128 + random.uniform(50, 90) * wave[..., None] * tint + random.normal(0, 12, (side, side, 3))
        images.append(np.clip(image + random.uniform(-20, 20), 0, 255).astype(np.uint8))
    return np.stack(images), labels


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    """The node of a name."""
    return next(one for one in proto.graph.node if one.name == name)


def ops(proto: onnx.ModelProto) -> list[str]:
    """The operators, in order."""
    return [one.op_type for one in proto.graph.node]


def run_float(proto: onnx.ModelProto, images: np.ndarray) -> np.ndarray:
    """Its logits, by ONNX's own reference implementation: NumPy, each node in the type that it says.

    ONNX Runtime's CPU computes most fp16 nodes in float32 and leaves out the rounding between them: nothing
    overflows there.
    """
    return watch(proto, images, ["logits"])["logits"]


def watch(proto: onnx.ModelProto, images: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Values inside a graph, by the same, as float32."""
    seen = onnx.ModelProto()
    seen.CopyFrom(proto)
    wanted = list(names)
    del seen.graph.output[:]
    seen.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    with np.errstate(over="ignore", invalid="ignore"):
        values = ReferenceEvaluator(seen).run(None, {"images": images})
    return {name: np.asarray(value, np.float32) for name, value in zip(wanted, values)}


def agree(one: np.ndarray, other: np.ndarray) -> float:
    """Share of equal decisions."""
    return float((one.argmax(1) == other.argmax(1)).mean())


def judge_against(
    expected: np.ndarray, images: np.ndarray, tolerance: float
) -> Callable[[onnx.ModelProto], Sequence[str]]:
    """A judge as parity is one: relative error, and NaN always fails."""

    def judge(proto: onnx.ModelProto) -> Sequence[str]:
        found = run_float(proto, images)
        if not np.isfinite(found).all():
            return ["not finite"]
        error = float(np.abs(found - expected).max() / np.abs(expected).max())
        return [f"relative error {error:.1e}"] if error > tolerance else []

    return judge
