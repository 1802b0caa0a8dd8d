"""A graph that takes whole pictures: its resize in grey levels, its network at the profile's tolerances."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import compose, numpy_helper, parser
from PIL import Image

from tests.support_export import SMALL, damage, edit_record
from tldist import api
from tldist.errors import PackageError
from tldist.export.answers import answer
from tldist.export.bisect import bisect
from tldist.export.graph import load_graph
from tldist.export.natural import extreme_images, natural_images
from tldist.export.whole import answer_pictures
from tldist.files import sha256_file
from tldist.runtime.preprocess import fit
from tldist.runtime.reference import Samples, read_reference, write_reference
from tldist.runtime.session import open_session

# The centre crop alone, for pictures whose shorter side is what the resize would make it; ``brighter`` stands
# for a resize that rounds otherwise.
FRONT = """
<ir_version: 10, opset_import: ["" : 20]>
front (uint8[batch, height, width, 3] images) => (uint8[batch, 40, 40, 3] fitted)
<int64[2] crop = {40, 40}, int64 two = {2}, int64[2] axes = {1, 2},
 uint8 brighter = {%d}, int64[2] off = {0, %d}>
{
  size = Shape<start = 1, end = 3>(images)
  spare = Sub(size, crop)
  half = Div(spare, two)
  begin = Add(half, off)
  finish = Add(begin, crop)
  cropped = Slice(images, begin, finish, axes)
  fitted = Add(cropped, brighter)
}
"""


def take_pictures(proto: onnx.ModelProto, brighter: int = 0, off: int = 0) -> None:
    """Put the crop in front of a graph."""
    front = parser.parse_model(FRONT % (brighter, off))
    front.ir_version = proto.ir_version
    del front.opset_import[:]
    front.opset_import.extend(proto.opset_import)
    front.graph.input[0].name = "images"
    prefixed = compose.add_prefix(front, "picture.", rename_inputs=False)
    metadata = list(proto.metadata_props)
    for node in proto.graph.node:
        node.input[:] = ["picture.fitted" if name == "images" else name for name in node.input]
    nodes = [*prefixed.graph.node, *proto.graph.node]
    del proto.graph.node[:], proto.graph.input[:]
    proto.graph.node.extend(nodes)
    proto.graph.input.extend(prefixed.graph.input)
    proto.graph.initializer.extend(prefixed.graph.initializer)
    assert metadata
    for entry in proto.metadata_props:
        if entry.key == "input":
            entry.value = "picture"


def pictures() -> Samples:
    shapes = [(46, 46), (46, 60), (58, 46), (46, 46)]
    found = tuple(natural_images(1, *shape, seed=n)[0] for n, shape in enumerate(shapes))
    extremes = extreme_images(46, 50)
    groups = (("generated", 4), *((name, len(part)) for name, part in extremes.items()))
    every = (*found, *(image for part in extremes.values() for image in part))
    return Samples(np.zeros((0, 40, 40, 3), np.uint8), groups, tuple(map(str, range(len(every)))), every)


def package_of(small: tuple[Path, Path], copy: Path, brighter: int = 0, off: int = 0) -> Path:
    """A package that takes pictures, its records made to agree."""
    damage(small[1], copy, lambda proto: take_pictures(proto, brighter, off))
    graph = load_graph(small[0], ("logits", "probabilities"), trust_code=True)[0]
    reference = answer_pictures(graph, copy / "model.onnx", pictures())[0]
    write_reference(copy / "reference.safetensors", reference)
    edit_record(copy, input="picture")
    certificate = json.loads((copy / "parity.json").read_text())
    certificate["files"]["reference.safetensors"] = sha256_file(copy / "reference.safetensors")
    (copy / "parity.json").write_text(json.dumps(certificate))
    names = ("reference.safetensors", "parity.json")
    edit_record(copy, files={name: sha256_file(copy / name) for name in names})
    return copy


def test_answer_pictures__are_those_of_pytorch_on_the_pixels_of_the_graph(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    package = package_of(small, tmp_path / "package", brighter=1)
    graph = load_graph(small[0], ("logits", "probabilities"), trust_code=True)[0]
    reference, resize, pixels = answer_pictures(graph, package / "model.onnx", pictures())
    fitted = np.stack([fit(Image.fromarray(picture), SMALL) for picture in pictures().pictures])
    np.testing.assert_array_equal(pixels, fitted + np.uint8(1))  # 255 becomes 0
    assert (resize.pictures, resize.most, resize.changed) == (11, 255, 1.0)
    plain = answer(graph, Samples(fitted, pictures().groups, pictures().ids))
    moved = answer(graph, Samples(pixels, pictures().groups, pictures().ids))
    for name in ("logits", "probabilities"):
        np.testing.assert_allclose(reference.fitted[name], plain.expected[name], atol=1e-6)
        np.testing.assert_allclose(reference.expected[name], moved.expected[name], atol=1e-6)
        np.testing.assert_allclose(reference.referee[name], moved.referee[name], atol=1e-12)
    assert reference.samples.pictures[1].shape == (46, 60, 3)


def test_parity__pictures_pass_both_ways_and_files_too(small: tuple[Path, Path], tmp_path: Path) -> None:
    package = package_of(small, tmp_path / "package")
    assert api.parity(models=(str(package),)).passed
    outcome = api.parity(models=(str(small[0]), str(package)), trust_code=True)
    assert outcome.passed
    assert outcome.values["resize"]["most"] == 0
    assert "resize in the graph, 11 pictures: at most 0 of 255 grey levels off" in outcome.text
    folder = tmp_path / "photos" / "a"
    folder.mkdir(parents=True)
    for number, picture in enumerate(pictures().pictures[:4]):
        Image.fromarray(picture).save(folder / f"{number}.png")
    data = {"path": str(folder.parent)}
    outcome = api.parity(models=(str(small[0]), str(package)), trust_code=True, data=data)
    assert outcome.passed
    assert outcome.values["files_compared"] == 4


def test_parity__resize_that_is_off_fails_though_the_network_is_right(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    package = package_of(small, tmp_path / "package", off=1)
    outcome = api.parity(models=(str(small[0]), str(package)), trust_code=True)
    assert not outcome.passed
    assert "grey levels off, 1 is allowed" in outcome.text
    assert all(part["passed"] for part in outcome.values["outputs"])
    groups = [group for part in outcome.values["outputs"] for group in part["groups"]]
    assert {group["source"] for group in groups} == {"profile"}  # PyTorch saw the graph's own pixels
    assert outcome.values["departure"] is None


def test_parity__wrong_weight_behind_a_resize_is_named(small: tuple[Path, Path], tmp_path: Path) -> None:
    package = package_of(small, tmp_path / "package")

    def harm(proto: onnx.ModelProto) -> None:
        tensor = next(t for t in proto.graph.initializer if t.name == "model.conv.weight")
        array = numpy_helper.to_array(tensor).copy()
        array[1, 1, 1, 1] += 0.5
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

    copy = damage(package, tmp_path / "copy", harm)
    outcome = api.parity(models=(str(small[0]), str(copy)), trust_code=True)
    assert not outcome.passed
    assert outcome.values["departure"]["value"] == "getitem_3"
    assert outcome.values["resize"]["most"] == 0


def test_parity__another_rounding_is_forgiven_where_pytorch_is_missing_and_no_more(
    small: tuple[Path, Path], tmp_path: Path
) -> None:
    """A machine whose resize rounds otherwise: as far off as PyTorch is on training's own pixels."""
    package = package_of(small, tmp_path / "package")
    reference = read_reference(package / "reference.safetensors")
    session = open_session(package / "model.onnx", threads=1)
    expected = {name: values.copy() for name, values in reference.expected.items()}

    def outcome_with(share: float) -> bool:
        for name, values in expected.items():
            reference.fitted[name][:] = values * 1.01
            reference.expected[name][:] = values * (1 + share)
            if name == "probabilities":
                reference.fitted[name][:] = reference.expected[name][:] = values
        write_reference(package / "reference.safetensors", reference)
        certificate = json.loads((package / "parity.json").read_text())
        certificate["files"]["reference.safetensors"] = sha256_file(package / "reference.safetensors")
        (package / "parity.json").write_text(json.dumps(certificate))
        names = ("reference.safetensors", "parity.json")
        edit_record(package, files={name: sha256_file(package / name) for name in names})
        return api.parity(models=(str(package),)).passed

    assert session.takes((46, 99, 3))
    assert outcome_with(0.0)
    assert outcome_with(0.004)
    assert not outcome_with(0.0065)


def test_answer_pictures__graph_without_a_resize_is_an_error(small: tuple[Path, Path]) -> None:
    graph = load_graph(small[0], ("logits", "probabilities"), trust_code=True)[0]
    with pytest.raises(PackageError, match=r"no value 'picture\.fitted'"):
        answer_pictures(graph, small[1] / "model.onnx", pictures())


def test_bisect__pictures_that_agree_have_no_departure(small: tuple[Path, Path], tmp_path: Path) -> None:
    package = package_of(small, tmp_path / "package")
    graph = load_graph(small[0], ("logits", "probabilities"), trust_code=True)[0]
    assert bisect(graph, package / "model.onnx", pictures().pictures[1][None]) is None


def test_answer__is_in_the_order_of_the_samples_though_sizes_come_in_turns(small: tuple[Path, Path]) -> None:
    graph = load_graph(small[0], ("logits", "probabilities"), trust_code=True)[0]
    shapes = [(50, 60), (44, 41), (50, 60), (44, 41)]
    others = tuple(natural_images(1, *shape, seed=n)[0] for n, shape in enumerate(shapes))
    samples = Samples(natural_images(2, 40, 40), (("real", 6),), tuple("abcdef"), others)
    found = answer(graph, samples)
    with torch.no_grad():
        alone = [graph(torch.from_numpy(image[None]))[0] for image in [*samples.images, *others]]
    expected = torch.cat(alone).numpy()
    np.testing.assert_allclose(found.expected["logits"], expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.referee["logits"], expected, rtol=0, atol=1e-6)
    assert np.abs(expected[2] - expected[3]).max() > 1e-4
    assert answer(graph, samples, referee=False).referee == {}
