"""A package of known answers, whose cost an image chooses, and the process of a server."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from tests.support import REPOSITORY
from tldist.runtime.package import PackageConfig, write_package
from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.reference import Reference, Samples, write_reference

SIZE = 24
CLASSES = ("red", "green", "blue", "robe d'été")
WEIGHTS = np.array([[4, -1, -1, 0.5], [-1, 4, -1, 0.5], [-1, -1, 4, 0.5]], np.float32)
FREE = 128
"""An image costs as many steps as the red of its first pixel lies above this."""
_SIDE = 1280


def colours(images: np.ndarray) -> np.ndarray:
    """The features: mean red, green and blue of each image, 0 to 1, float64 (N, 3)."""
    return images.astype(np.float64).mean((1, 2)) / 255


def logits(images: np.ndarray) -> np.ndarray:
    """What the package gives, float64 (N, 4)."""
    return colours(images) @ WEIGHTS.astype(np.float64)


def image_of(random: np.random.Generator, cost: int = 0, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """Noise around a random colour, uint8 (H, W, 3), that costs ``cost`` steps (20 ms each, or so) to run."""
    height, width = size
    colour = random.integers(30, 220, 3)
    picture = np.clip(colour + random.integers(-30, 30, (height, width, 3)), 0, 255).astype(np.uint8)
    picture[0, 0, 0] = FREE + cost if cost else 0
    return picture


def as_png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def write_colour_package(
    folder: Path, *, any_size: bool = False, free: int = FREE, nan: bool = False
) -> Path:
    """A package of a graph that costs what its images ask for; ``nan``: whose logits are not numbers."""
    folder.mkdir(parents=True)
    how = Preprocessing(height=SIZE, width=SIZE, resize=SIZE)
    config = PackageConfig(
        classes=CLASSES,
        preprocessing=how,
        outputs={"logits": len(CLASSES), "features": 3},
        profile={
            "name": "test",
            "provider": "CPUExecutionProvider",
            "tolerances": {"max_relative": 1e-4, "min_cosine": 0.9999, "max_flipped": 0},
        },
        bundle={"identity": "0" * 64, "weights": "1" * 64},
        input="picture" if any_size else "fixed",
    )
    proto = _graph(None if any_size else SIZE, free, nan)
    helper.set_model_props(proto, config.graph_metadata())
    onnx.save(proto, folder / "model.onnx")
    random = np.random.default_rng(1)
    images = np.stack([image_of(random) for _ in range(4)])
    expected = {"logits": logits(images), "features": colours(images)}
    samples = Samples(images, (("pictures", 4),), tuple("abcd"))
    as_float = {name: values.astype(np.float32) for name, values in expected.items()}
    write_reference(folder / "reference.safetensors", Reference(samples, as_float, expected))
    (folder / "parity.json").write_text("{}")
    write_package(folder, config)
    return folder


def _graph(side: int | None, free: int, nan: bool) -> onnx.ModelProto:
    """features = mean colour; logits = features @ WEIGHTS + 0 * (as many matrix products as asked for)."""
    constants = {
        "hw": np.array([1, 2]), "full": np.float32(255), "weights": WEIGHTS, "free": np.int64(free),
        "nothing": np.int64(0), "from": np.array([0, 0, 0]), "to": np.array([1, 1, 1]),
        "axes": np.array([1, 2, 3]), "go": np.array(True), "zero": np.float32("nan" if nan else 0),
        "shape": np.array([_SIDE, _SIDE]), "mix": np.full((_SIDE, _SIDE), 1 / _SIDE, np.float32),
    }  # fmt: skip
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go_in"], ["go_out"]),
            helper.make_node("MatMul", ["state_in", "mix"], ["state_out"]),
        ],
        "step",
        [
            helper.make_tensor_value_info("step_number", TensorProto.INT64, []),
            helper.make_tensor_value_info("go_in", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_in", TensorProto.FLOAT, [_SIDE, _SIDE]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, [_SIDE, _SIDE]),
        ],
    )
    nodes = [
        helper.make_node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "hw"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "full"], ["features"]),
        helper.make_node("MatMul", ["features", "weights"], ["plain"]),
        helper.make_node("Slice", ["images", "from", "to", "axes"], ["first"]),
        helper.make_node("Cast", ["first"], ["asked"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["asked"], ["most"], keepdims=0),
        helper.make_node("Sub", ["most", "free"], ["above"]),
        helper.make_node("Max", ["above", "nothing"], ["steps"]),
        helper.make_node("ReduceMean", ["features"], ["seed"], keepdims=0),
        helper.make_node("Expand", ["seed", "shape"], ["state"]),
        helper.make_node("Loop", ["steps", "go", "state"], ["end"], body=body),
        helper.make_node("ReduceMean", ["end"], ["worked"], keepdims=0),
        helper.make_node("Mul", ["worked", "zero"], ["naught"]),
        helper.make_node("Add", ["plain", "naught"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", side or "h", side or "w", 3])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(CLASSES)]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 3]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(proto)
    return proto


# -- the server ------------------------------------------------------------------------------------------

_START = """
import sys
for name in ("torch", "torchvision", "accelerate", "onnx", "onnxscript", "pyarrow"):
    sys.modules[name] = None
from tldist.cli import main
raise SystemExit(main(["serve", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Reply:
    """An HTTP response; the names of its headers in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server:
    """``tldist serve`` in a process where torch and onnx cannot be imported."""

    def __init__(self, package: Path, *settings: str, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(package), "port=0", "threads=1", *settings],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        self.line = self.process.stdout.readline() if ready else ""
        found = re.search(r"http://([\d.]+):(\d+)$", self.line.strip())
        if not found:
            self.process.kill()
            raise AssertionError(f"the server did not start: {self.line} {self.process.communicate()[1]}")
        self.host, self.port = found[1], int(found[2])
        if wait:
            self.wait_until_ready()

    def wait_until_ready(self, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while self.ask("GET", "/readyz").status != 200:
            assert time.monotonic() < until, "not ready in time"
            time.sleep(0.05)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on its own connection; underscores in header names stand for dashes."""
        connection = self.connect()
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, names)
            return read_reply(connection)
        finally:
            connection.close()

    def predict(self, body: bytes, query: str = "", kind: str = "image/png") -> Reply:
        return self.ask("POST", f"/predict{query}", body, Content_Type=kind)

    def metrics(self) -> dict[str, float]:
        """Value of each sample, its labels in the name: ``x_total{code=200,path=/predict}``."""
        text = self.ask("GET", "/metrics").body.decode()
        found = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
        return found

    def wait_for(self, metric: str, value: float, seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while (found := self.metrics().get(metric)) != value:
            assert time.monotonic() < until, f"{metric} is {found}, expected {value}"
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str, str]:
        """Exit code, and what was printed, of a server that is told to stop."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def read_reply(connection: http.client.HTTPConnection) -> Reply:
    response = connection.getresponse()
    names = {name.lower(): value for name, value in response.getheaders()}
    return Reply(response.status, names, response.read())


def multipart(files: dict[str, bytes], boundary: str = "xXboundaryXx") -> tuple[bytes, str]:
    """Body and content type of files, by their names."""
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="{name}"\r\n'
        f"Content-Type: application/octet-stream\r\n\r\n".encode()
        + data
        + b"\r\n"
        for name, data in files.items()
    ]
    return b"".join(parts) + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"
