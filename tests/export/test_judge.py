"""Which samples run at which batch size, and what happens where a graph cannot take one. Real graphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import parser

from tldist.export.agreement import Resize
from tldist.export.judge import answers_alone, departing_images, judge
from tldist.export.profile import Tolerances
from tldist.export.verdict import Verdict
from tldist.runtime.reference import Reference, Samples
from tldist.runtime.session import Session, open_session

TOLERANCES = Tolerances(max_relative=1e-4, min_cosine=0.999999, max_flipped=0.0)
MEANS = """
<ir_version: 8, opset_import: ["" : 18]>
means (uint8[batch, {size}, 3] images) => (float[batch, 3] logits)
<int64[2] axes = {{1, 2}}, float scale = {{255}}>
{{
  real = Cast<to = 1>(images)
  scaled = Div(real, scale)
  {body}
}}
"""
PLAIN = "logits = ReduceMean<keepdims = 0>(scaled, axes)"
ACROSS = """
  own = ReduceMean<keepdims = 0>(scaled, axes)
  zero = Constant<value = int64[1] {0}>()
  all = ReduceMean<keepdims = 1>(own, zero)
  gap = Sub(own, all)
  logits = Add(own, gap)
"""
"""The mean colour of each image; and one that looks at the other images of the batch."""


def session_of(folder: Path, body: str = PLAIN, size: str = "height, width") -> Session:
    onnx.save(parser.parse_model(MEANS.format(size=size, body=body)), folder / "model.onnx")
    return open_session(folder / "model.onnx", threads=1)


def reference_of(count: int, others: int = 0) -> Reference:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count + 7, 6, 5, 3), dtype=np.uint8)
    pictures = tuple(random.integers(0, 256, (4 + n, 9, 3), dtype=np.uint8) for n in range(others))
    groups = [("real", count), ("black", 1), ("white", 1), ("noise", 5)]
    groups += [("other", others)] if others else []
    samples = Samples(images, tuple(groups), tuple(map(str, range(count + 7 + others))), pictures)
    means = np.stack([image.mean((0, 1)) / 255 for image in [*images, *pictures]])
    return Reference(samples, {"logits": means.astype(np.float32)}, {"logits": means})


def shifted(reference: Reference, row: int) -> Reference:
    """The same, and PyTorch says something else about one sample."""
    for part in (reference.expected, reference.referee):
        part["logits"][row] += 0.01
    return reference


@pytest.mark.parametrize(("count", "rows"), [(1, 8 * 3 + 32), (17, 24 * 3 + 32), (100, 24 * 3 + 128)])
def test_judge__every_sample_runs_in_a_large_batch_and_few_in_small_ones(
    tmp_path: Path, count: int, rows: int
) -> None:
    (found,) = judge(session_of(tmp_path), reference_of(count), TOLERANCES)
    assert found.passed
    assert found.rows == rows
    for row in [0, count // 2, count - 1, count, count + 6]:
        assert not judge(session_of(tmp_path), shifted(reference_of(count), row), TOLERANCES)[0].passed


def test_judge__images_of_other_sizes_run_alone_and_together(tmp_path: Path) -> None:
    session, reference = session_of(tmp_path), reference_of(2, others=3)
    (found,) = judge(session, reference, TOLERANCES)
    assert found.passed
    assert {part.name: part.rows for part in found.groups}["other"] == 3 * (1 + 2)
    assert "other samples" in judge(session, shifted(reference, -1), TOLERANCES)[0].faults[0]


def test_answers_alone__are_in_the_order_of_the_samples(tmp_path: Path) -> None:
    """Images run size by size, and sizes come in turns."""
    random = np.random.default_rng(0)
    shapes = [(4, 9), (7, 3), (4, 9), (7, 3), (5, 5)]
    pictures = tuple(random.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes)
    samples = Samples(np.zeros((1, 6, 5, 3), np.uint8), (("real", 6),), tuple("abcdef"), pictures)
    expected = np.stack([image.mean((0, 1)) / 255 for image in [*samples.images, *pictures]])
    np.testing.assert_allclose(answers_alone(session_of(tmp_path), samples)["logits"], expected, atol=1e-6)


def test_judge__graph_that_mixes_the_images_of_a_batch_fails(tmp_path: Path) -> None:
    session, reference = session_of(tmp_path, ACROSS), reference_of(4)
    alone = answers_alone(session, reference.samples)
    np.testing.assert_allclose(alone["logits"], reference.expected["logits"], atol=1e-6)
    assert not judge(session, reference, TOLERANCES)[0].passed
    images = departing_images(session, reference)
    assert len(images) == 2
    assert np.abs(session.run(images)["logits"] - reference.expected["logits"][:2]).max() > 0


def test_judge__batch_that_a_graph_cannot_take_is_a_fault(tmp_path: Path) -> None:
    body = """
  own = ReduceMean<keepdims = 0>(scaled, axes)
  shape = Constant<value = int64[2] {1, 3}>()
  logits = Reshape(own, shape)
"""
    (found,) = judge(session_of(tmp_path, body), reference_of(4), TOLERANCES)
    assert not found.passed
    assert [fault.split(":")[0] for fault in found.faults] == [
        f"it fails at batch size {size}" for size in (2, 7, 32)
    ]
    assert found.rows == 11


def test_judge__answers_that_are_too_few_are_a_fault(tmp_path: Path) -> None:
    body = """
  own = ReduceMean<keepdims = 0>(scaled, axes)
  zero = Constant<value = int64[1] {0}>()
  logits = ReduceMean<keepdims = 1>(own, zero)
"""
    (found,) = judge(session_of(tmp_path, body), reference_of(4), TOLERANCES)
    assert "for a batch of 2 it gives {'logits': 1} rows" in found.faults


def test_departing_images__is_the_one_that_is_farthest_off(tmp_path: Path) -> None:
    session, reference = session_of(tmp_path), reference_of(3, others=2)
    reference.expected["logits"][2] *= 1.01
    reference.expected["logits"][11, 1] *= 1.1
    np.testing.assert_array_equal(departing_images(session, reference)[0], reference.samples.pictures[1])


def test_judge__probabilities_are_held_to_what_the_logits_allow(tmp_path: Path) -> None:
    body = """
  logits = ReduceMean<keepdims = 0>(scaled, axes)
  tempered = Mul(logits, sharp)
  probabilities = Softmax<axis = 1>(tempered)
"""
    text = MEANS.format(size="height, width", body=body)
    text = text.replace("logits)\n<", "logits, float[batch, 3] probabilities)\n<float sharp = {50},")
    onnx.save(parser.parse_model(text), tmp_path / "model.onnx")
    session, reference = open_session(tmp_path / "model.onnx", threads=1), reference_of(6)
    logits = reference.expected["logits"].astype(float)
    off = logits + 0.009 * np.abs(logits).max() * np.sign(np.random.default_rng(0).normal(size=logits.shape))
    wide = Tolerances(max_relative=0.02, min_cosine=0.99, max_flipped=1.0)
    powers = np.exp(50 * off)
    reference.expected["probabilities"] = (powers / powers.sum(1, keepdims=True)).astype(np.float32)
    found = {part.output: part for part in judge(session, reference, wide, temperature=1 / 50)}
    part = found["probabilities"].worst
    assert part is not None
    assert part.source == "logits"
    assert found["probabilities"].passed  # 50 times 0.009 of logits of 1, half of it in the probabilities
    assert part.max_relative > 0.05
    assert not judge(session, reference, wide, temperature=1.0)[1].passed


def test_verdict__resize_that_is_off_fails_and_one_level_does_not() -> None:
    agreements = ()
    for most, words in ((1, "at most 1 of 255"), (2, "fault: the graph's resize is 2 grey levels off")):
        verdict = Verdict("PyTorch", agreements, (("real", 1),), "CPU", resize=Resize(1, most, 0.1, 0.2))
        assert verdict.values_agree == (most == 1)
        assert words in verdict.to_text()
