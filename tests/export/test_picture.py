"""Whole pictures in: resize and crop inside the graph compute what `fit` computes, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from tests.support_models import lively_model
from tldist.export import picture
from tldist.export.conversion_check import fit_difference, picture_fault
from tldist.export.converter import convert, resize_inside
from tldist.export.graph import ExportGraph, run_graph
from tldist.export.natural import natural_images
from tldist.export.picture import FITTED, fit_graph
from tldist.runtime.preprocess import Preprocessing, fit
from tldist.runtime.session import open_session

SIZES = [
    (31, 47), (97, 131), (480, 641), (641, 479), (20, 300), (300, 20), (46, 46), (256, 256), (7, 5), (1, 3),
    (3, 1), (46, 91), (92, 92), (53, 50), (1, 1), (40, 40), (48, 33),
]  # fmt: skip
"""(H, W): odd, up and down, portrait and landscape, smaller than the crop, of just the size."""


def front(how: Preprocessing, opset: int = 18) -> onnxruntime.InferenceSession:
    made = onnx.helper.make_opsetid("", opset)
    model = onnx.helper.make_model(fit_graph(how), opset_imports=[made], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def pictures(size: tuple[int, int]) -> list[np.ndarray]:
    """Noise, hard edges (where cubic weights overshoot), and something like a photograph."""
    noise = np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)
    edges = np.where(noise > 127, 255, 0).astype(np.uint8)
    return [noise, edges, *(natural_images(1, *size) if max(size) > 1 else [])]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    ("height", "width", "resize"), [(40, 40, 46), (48, 32, 20), (33, 41, 50), (40, 40, 40), (17, 32, 35)]
)
def test_fit__is_what_pillow_computes(interpolation: Any, height: int, width: int, resize: int) -> None:
    how = Preprocessing(height, width, resize, interpolation)
    session = front(how)
    for size in SIZES:
        batch = np.stack(pictures(size))
        (found,) = session.run([FITTED], {"images": batch})
        expected = np.stack([fit(Image.fromarray(each), how) for each in batch])
        assert found.dtype == np.uint8
        assert found.shape == expected.shape
        np.testing.assert_array_equal(found, expected, err_msg=str(size))


def test_fit__crop_offsets_are_rounded_half_to_even() -> None:
    """A picture that is not resized, whose pixels tell where they were: crops of 0.5, 1.5, 2.5 pixels."""
    for spare in range(12):
        how = Preprocessing(8, 8, 8)
        columns = np.tile(np.arange(8 + spare, dtype=np.uint8) * 10, (8, 1))
        for plane in (columns, columns.T):
            stacked = np.repeat(plane[:, :, None], 3, 2)
            (found,) = front(how).run([FITTED], {"images": stacked[None]})
            np.testing.assert_array_equal(found[0], fit(Image.fromarray(stacked), how))


def test_fit__later_operator_sets_do_the_same() -> None:
    how = Preprocessing(40, 33, 46, "bicubic")
    for opset in (18, 20, 22):
        assert fit_difference(how, (97, 131), opset) == 0


def test_fit__a_wrong_resize_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    how = Preprocessing(40, 40, 46, "bicubic")
    proto = convert_tiny(how).proto
    assert picture_fault(proto, how) == ""
    monkeypatch.setitem(picture._CUBIC_CONSTANTS, "a", -0.75)
    assert "of 255 off on a picture of" in picture_fault(proto, how)


def convert_tiny(how: Preprocessing, exporter: Any = "torchscript") -> Any:
    model = lively_model("tests.support_export:free_cnn", 4)
    return convert(ExportGraph(model, how, ("logits", "features"), input="picture").eval(), None, exporter)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_convert__picture_answers_as_pytorch_does_of_the_fitted_one(exporter: Any, tmp_path: Any) -> None:
    how = Preprocessing(40, 32, 46, "bicubic")
    model = lively_model("tests.support_export:free_cnn", 4)
    graph = ExportGraph(model, how, ("logits", "features"), input="picture").eval()
    proto = convert(graph, None, exporter).proto
    resize_inside(proto, how)
    shape = [side.dim_param or side.dim_value for side in proto.graph.input[0].type.tensor_type.shape.dim]
    assert shape == ["batch", "height", "width", 3]
    onnx.save(proto, tmp_path / "model.onnx")
    session = open_session(tmp_path / "model.onnx", threads=1)
    assert (session.height, session.width) == (None, None)
    for size in ((97, 131), (35, 30), (64, 40)):
        batch = natural_images(3, *size)
        fitted = np.stack([fit(Image.fromarray(each), how) for each in batch])
        with torch.no_grad():
            expected = run_graph(graph, fitted)
        for name, values in session.run(batch).items():
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(values, expected[name], rtol=0, atol=2e-5 * scale)
