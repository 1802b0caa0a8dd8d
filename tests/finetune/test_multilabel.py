"""Images with several classes, or none: learned, measured, exported and served as such."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from torch import nn

from tests.support import make_images
from tests.support_processes import run_ranks
from tldist import api
from tldist.domain import open_domain
from tldist.domain.recipe import DataRecipe
from tldist.errors import BundleError, DomainError, RecipeError
from tldist.models.load import load_bundle
from tldist.runtime.package import Package
from tldist.runtime.predict import predict
from tldist.runtime.preprocess import normalize, prepare
from tldist.training.objective import binary_cross_entropy

NAMES = ("blue", "green", "red")
SETTINGS = {
    "model": "tests.nets:plain_cnn", "weights": "none", "image_size": 32, "precision": "fp32",
    "batch_size": 16, "workers": 0, "epochs": 8, "augment": {"crop": None}, "optimizer": {"lr": 0.02},
}  # fmt: skip


def picture(random: np.random.Generator, tags: np.ndarray) -> bytes:
    """Noise, with a bright patch in the channel of each class."""
    pixels = random.integers(0, 90, (32, 32, 3), dtype=np.uint8)
    for place, channel in enumerate((2, 1, 0)):
        if tags[place]:
            row, column = random.integers(0, 16, 2)
            pixels[row : row + 16, column : column + 16, channel] = 250
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, count: int, seed: int, labels: str = "names") -> None:
    random = np.random.default_rng(seed)
    tags = random.random((count, 3)) < 0.45
    names = [[NAMES[place] for place in np.flatnonzero(row)] for row in tags]
    column = pa.array(names, pa.list_(pa.string()))
    if labels == "nulls":
        column = pa.array([None, *names[1:]], pa.list_(pa.string()))
    table = pa.table({"image": [picture(random, row) for row in tags], "label": column})
    if labels == "datasets":
        numbers = pa.array([np.flatnonzero(row).tolist() for row in tags], pa.list_(pa.int64()))
        feature = {"feature": {"names": list(NAMES), "_type": "ClassLabel"}, "_type": "Sequence"}
        info = {"info": {"features": {"label": feature}}}
        table = table.set_column(1, "label", numbers).replace_schema_metadata(
            {"huggingface": json.dumps(info)}
        )
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write(folder / "train-0.parquet", 120, 0)
    write(folder / "val-0.parquet", 70, 1)
    return folder


def finetune(data: Path, out: Path, settings: dict[str, object] | None = None) -> None:
    api.finetune(data=str(data), out=out, **{**SETTINGS, **(settings or {})})


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "r"
    finetune(data, out)
    return out


def summary(out: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((out / "summary.json").read_text())


def logits_and_truth(run_folder: Path, data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Of the val split, with nothing of tldist's measuring."""
    model, config = load_bundle(run_folder, trust_code=True)
    table = pq.read_table(data / "val-0.parquet").to_pylist()
    images = np.stack([prepare(row["image"], config.preprocessing) for row in table])
    inputs = torch.from_numpy(normalize(images, config.preprocessing.mean, config.preprocessing.std))
    with torch.no_grad():
        logits = model(inputs).double().numpy()
    return logits, np.array([[name in row["label"] for name in config.classes] for row in table])


@pytest.mark.parametrize("labels", ["names", "datasets"])
def test_domain__of_lists_of_classes(tmp_path: Path, labels: str) -> None:
    write(tmp_path / "d.parquet", 40, 3, labels)
    domain = open_domain(DataRecipe.make(path=str(tmp_path / "d.parquet")))
    assert domain.is_multilabel
    assert domain.has_labels
    assert domain.classes == NAMES
    expected = np.random.default_rng(3).random((40, 3)) < 0.45
    assert np.array_equal(domain.tags, expected)
    other = domain.labels_in(["red", "other", "green", "blue"])
    assert np.array_equal(other, np.stack([expected[:, 2], 0 * expected[:, 0], *expected.T[1::-1]], 1))
    some = domain.subset([5, 1])
    assert np.array_equal(some.tags, expected[[5, 1]])
    rest, held = domain.carve(0.25, 0)
    assert (len(rest), len(held)) == (30, 10)


def test_domain__rows_without_a_list_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "d.parquet", 10, 3, "nulls")
    with pytest.raises(DomainError, match="1 of 10 rows have no list of classes"):
        open_domain(DataRecipe.make(path=str(tmp_path / "d.parquet")))


def test_finetune__learns_several_classes_and_measures_as_scikit_learn_does(
    run_folder: Path, data: Path
) -> None:
    found = summary(run_folder)["validation"]
    logits, truth = logits_and_truth(run_folder, data)
    precisions = [average_precision_score(truth[:, k], logits[:, k]) for k in range(3)]
    assert found["mean_average_precision"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert found["mean_average_precision"] > 0.9
    assert found["per_class"] == pytest.approx(dict(zip(NAMES, precisions)), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(truth.ravel(), logits.ravel() > 0), abs=1e-6)
    assert found["accuracy"] == pytest.approx(((logits > 0) == truth).mean())
    loss = nn.functional.binary_cross_entropy_with_logits(
        torch.from_numpy(logits), torch.from_numpy(truth * 1.0)
    )
    assert found["loss"] == pytest.approx(float(loss), abs=1e-6)


def test_objective__is_the_mean_of_binary_cross_entropies() -> None:
    logits, targets = torch.randn(5, 3), (torch.rand(5, 3) > 0.5).float()
    smooth = 0.8 * targets + 0.1
    p = logits.double().sigmoid()
    expected = -(smooth * p.log() + (1 - smooth) * (1 - p).log()).mean(1)
    assert torch.allclose(binary_cross_entropy(0.2)(logits, targets).double(), expected, atol=1e-6)


def test_temperature__is_that_of_each_class_by_itself(run_folder: Path, data: Path) -> None:
    temperature = load_bundle(run_folder, trust_code=True)[1].temperature
    logits, truth = logits_and_truth(run_folder, data)

    def loss(t: float) -> float:
        p = torch.from_numpy(logits / t)
        return float(nn.functional.binary_cross_entropy_with_logits(p, torch.from_numpy(truth * 1.0)))

    assert loss(temperature) < min(loss(temperature * 1.03), loss(temperature / 1.03))


def test_evaluate_export_and_predict__go_by_sigmoid(run_folder: Path, data: Path, tmp_path: Path) -> None:
    api.export(
        bundle=run_folder / "bundle", profile="cpu-fp32", out=tmp_path / "p", output="probabilities",
        trust_code=True,
    )  # fmt: skip
    bundle, package = (
        api.evaluate(model=model, data=str(data), workers=0, trust_code=True).values
        for model in (run_folder / "bundle", tmp_path / "p")
    )
    assert bundle["mean_average_precision"] == summary(run_folder)["validation"]["mean_average_precision"]
    assert package["mean_average_precision"] == pytest.approx(bundle["mean_average_precision"])
    logits, _ = logits_and_truth(run_folder, data)
    expected = 1 / (1 + np.exp(-logits / load_bundle(run_folder, trust_code=True)[1].temperature))
    opened = Package.open(tmp_path / "p")
    assert opened.config.task == "multilabel"
    pictures = [row["image"] for row in pq.read_table(data / "val-0.parquet").to_pylist()]
    for answer, row in zip(predict(opened, pictures, top=3), expected):
        assert dict(answer.top) == pytest.approx(dict(zip(NAMES, row)), abs=1e-4)


def test_processes__two_learn_the_same(data: Path, tmp_path: Path) -> None:
    settings: dict[str, object] = {"epochs": 2, "optimizer": {"name": "sgd", "lr": 0.1}, "track": None}
    finetune(data, tmp_path / "one", settings)
    run_ranks(finetune, 2, data, tmp_path / "two", settings)
    one, two = (load_bundle(tmp_path / name, trust_code=True)[0].state_dict() for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    ours, theirs = (summary(tmp_path / name)["validation"] for name in ("one", "two"))
    assert ours["per_class"] == pytest.approx(theirs["per_class"])
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_also__with_mixup_a_cached_probe_and_a_sweep(data: Path, tmp_path: Path) -> None:
    finetune(data, tmp_path / "mixed", {"epochs": 1, "augment": {"mixup": 0.4, "cutmix": 0.4}})
    still = {"crop": None, "flip": False}
    probes = {"train": "head", "augment": still, "sweep": {"lr": (1e-3, 0.1)}}
    finetune(data, tmp_path / "sweep", {**probes, "cache": {"folder": tmp_path / "c"}})
    rows = summary(tmp_path / "sweep")["sweep"]
    assert rows[0]["accuracy"] >= rows[1]["accuracy"]
    assert summary(tmp_path / "sweep")["validation"]["mean_average_precision"] == pytest.approx(
        rows[0]["accuracy"]
    )


def test_refused__what_needs_one_class_an_image(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="class_weights=balanced weighs images of one class each"):
        finetune(data, tmp_path / "r", {"class_weights": "balanced"})


def test_fuse__keeps_the_task_and_refuses_to_mix(run_folder: Path, data: Path, tmp_path: Path) -> None:
    api.fuse(
        bundles=[run_folder, run_folder],
        method="average",
        out=tmp_path / "f",
        data=str(data),
        trust_code=True,
    )
    found = summary(tmp_path / "f")["after"]["mean_average_precision"]
    assert found == pytest.approx(summary(run_folder)["validation"]["mean_average_precision"])
    assert load_bundle(tmp_path / "f", trust_code=True)[1].task == "multilabel"

    make_images(tmp_path / "one", {"blue": 6, "green": 6, "red": 6})
    finetune(tmp_path / "one", tmp_path / "single", {"epochs": 1})
    with pytest.raises(BundleError, match="They cannot be fused"):
        api.fuse(
            bundles=[run_folder, tmp_path / "single"], method="average", out=tmp_path / "g", trust_code=True
        )
    with pytest.raises(DomainError, match="its images have one class each, and the model answers with any"):
        api.evaluate(model=run_folder / "bundle", data=str(tmp_path / "one"), workers=0, trust_code=True)
    with pytest.raises(
        DomainError, match="its images have several classes each, and the model answers with one"
    ):
        api.evaluate(model=tmp_path / "single", data=str(data), workers=0, trust_code=True)
