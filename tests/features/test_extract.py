"""Features against torchvision's own extractor; the same for any number of processes and batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.feature_extraction import create_feature_extractor

from tests.support import make_images
from tests.support_models import SMALL, lively_model
from tests.support_processes import RanksFailed, run_ranks
from tldist import distributed
from tldist.domain import DataRecipe, open_domain
from tldist.errors import DomainError, ModelError
from tldist.features.extract import Features, extract
from tldist.runtime.preprocess import IMAGENET_MEAN, IMAGENET_STD, prepare
from tldist.training.ledger import Ledger

CLASSES = {"ant": 5, "bee": 4, "cat": 4}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), CLASSES)


def decoded(folder: Path) -> tuple[torch.Tensor, list[str]]:
    """All images as a normalised tensor, made without tldist's loader."""
    files = [folder / name / f"{number}.png" for name, count in CLASSES.items() for number in range(count)]
    pictures = np.stack([prepare(file.read_bytes(), SMALL) for file in files]).astype(np.float32) / 255
    normal = (pictures - np.array(IMAGENET_MEAN, np.float32)) / np.array(IMAGENET_STD, np.float32)
    return torch.from_numpy(normal.transpose(0, 3, 1, 2).copy()), [file.parent.name for file in files]


@pytest.mark.parametrize(
    ("name", "node"),
    [("resnet18", "flatten"), ("mobilenet_v3_small", "classifier.1"), ("squeezenet1_1", "features")],
)
def test_extract__is_the_input_of_the_head(images: Path, name: str, node: str) -> None:
    model, domain = lively_model(name, 3), open_domain(images)
    found = extract(model, SMALL, domain, distributed.start(), batch_size=4)
    pictures, names = decoded(images)
    with torch.no_grad():
        expected = create_feature_extractor(model, {node: "out"})(pictures)["out"]
    expected = expected.flatten(2).mean(2) if expected.dim() > 2 else expected
    torch.testing.assert_close(found.features, expected, atol=1e-4, rtol=1e-4)
    assert [domain.classes[label] for label in found.labels] == names
    assert found.features.dtype == torch.float32


def test_extract__labels_follow_the_list_that_is_asked_for(images: Path) -> None:
    model, classes = lively_model("squeezenet1_1", 3), ("cat", "dog", "ant", "bee")
    found = extract(model, SMALL, open_domain(images), distributed.start(), classes=classes)
    assert [classes[label] for label in found.labels] == decoded(images)[1]


def _run(folder: Path, batch_size: int) -> Features:
    model = lively_model("resnet18", 3)
    return extract(model, SMALL, open_domain(folder), distributed.start(), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 13, 64])
def test_extract__processes_do_not_matter(images: Path, batch_size: int) -> None:
    alone = run_ranks(_run, 1, images, batch_size)[0]
    assert alone.indices.tolist() == list(range(13))
    for ranks in (2, 3):
        for found in run_ranks(_run, ranks, images, batch_size):
            assert torch.equal(found.features, alone.features)  # whole batches: to the bit
            assert torch.equal(found.labels, alone.labels)
            assert torch.equal(found.indices, alone.indices)


def test_extract__broken_images_are_left_out_and_listed(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", CLASSES)
    (folder / "bee" / "2.png").write_bytes(b"not an image")
    domain = open_domain(DataRecipe(path=str(folder), max_bad=0.1))
    ledger = Ledger(domain, tmp_path / "bad.jsonl")
    found = extract(
        lively_model("squeezenet1_1", 3), SMALL, domain, distributed.start(), batch_size=3, ledger=ledger
    )
    assert found.indices.tolist() == [index for index in range(13) if index != 7]
    assert "bee/2.png" in (tmp_path / "bad.jsonl").read_text()


def test_extract__too_many_broken_images_stop_every_process(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", CLASSES)
    (folder / "bee" / "2.png").write_bytes(b"not an image")
    with pytest.raises(RanksFailed) as failed:
        run_ranks(_run, 2, folder, 4)
    assert {name for name, _ in failed.value.errors.values()} == {"DomainError"}
    assert len(failed.value.errors) == 2


def test_extract__nothing_to_decode_is_an_error(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", {"a": 1, "b": 1})
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")
    domain = open_domain(DataRecipe(path=str(folder), max_bad=1.0))
    with pytest.raises(DomainError, match="no image could be decoded"):
        extract(lively_model("squeezenet1_1", 2), SMALL, domain, distributed.start())


def test_extract__a_feature_that_is_not_finite_names_the_image(images: Path) -> None:
    model = lively_model("resnet18", 3)
    model.bn1.running_var[0] = float("nan")
    with pytest.raises(ModelError, match=r"not finite.*ant/0\.png"):
        extract(model, SMALL, open_domain(images), distributed.start())


def test_extract__one_colour_image_and_odd_sizes(tmp_path: Path) -> None:
    for number, size in enumerate([(5, 90), (64, 33), (1, 1)]):
        (tmp_path / "images" / "x").mkdir(parents=True, exist_ok=True)
        Image.new("L", size, 128).save(tmp_path / "images" / "x" / f"{number}.png")
    found = extract(lively_model("resnet18", 2), SMALL, open_domain(tmp_path / "images"), distributed.start())
    torch.testing.assert_close(found.features[0], found.features[2], atol=1e-5, rtol=1e-5)
