"""A package so small that its features can be computed by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tldist.runtime.package import MODEL, PARITY, REFERENCE, PackageConfig, write_package
from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.reference import Reference, Samples, write_reference

SIZE = 32
"""Pixels of its input."""


def tiny_package(
    path: Path, weights: np.ndarray, output: str = "features", kind: Literal["fixed", "picture"] = "fixed"
) -> Path:
    """A package: mean over the pixels (N, 3), times ``weights`` (3, D). Of kind ``picture`` it takes any
    size (and resizes nothing: the mean is that of the whole picture)."""
    path.mkdir(parents=True)
    outputs = {output: weights.shape[1]}
    classes = tuple(f"c{k}" for k in range(weights.shape[1])) if output == "logits" else ()
    how = Preprocessing(height=SIZE, width=SIZE, resize=SIZE)
    profile = {
        "name": "cpu-fp32",
        "tolerances": {"max_relative": 1e-5, "min_cosine": 0.999, "max_flipped": 0},
    }
    config = PackageConfig(classes, how, outputs, profile, {"identity": "i", "weights": "w"})
    config = replace(config, input=kind)
    sides = (SIZE, SIZE) if kind == "fixed" else ("height", "width")
    nodes = [
        helper.make_node("Cast", ["images"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["real", "axes"], ["mean"], keepdims=0),
        helper.make_node("MatMul", ["mean", "weights"], [output]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", *sides, 3])],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["batch", weights.shape[1]])],
        [
            numpy_helper.from_array(np.array([1, 2], dtype=np.int64), "axes"),
            numpy_helper.from_array(weights, "weights"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    for key, value in config.graph_metadata().items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.save(model, path / MODEL)
    images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), dtype=np.uint8)
    samples = Samples(images, (("generated", 3),), ("a", "b", "c"))
    expected = {output: images.mean((1, 2)).astype(np.float32) @ weights}
    write_reference(path / REFERENCE, Reference(samples, expected))
    (path / PARITY).write_text('{"files": {}}')
    write_package(path, config)
    return path
