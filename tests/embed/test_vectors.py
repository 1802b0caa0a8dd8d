"""What lies in the Parquet files: against a plain forward pass written here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision import models
from torchvision.transforms.functional import center_crop, resize

from tests.embed.vectors import matrix, read_all
from tests.support import class_image, encode, make_images
from tldist import api
from tldist.errors import BundleError, DomainError, PackageError, RecipeError
from tldist.models.chain import Chain, Scale
from tldist.models.load import load_bundle, save_bundle
from tldist.models.zoo import describe_network


def plain_input(path: Path) -> torch.Tensor:
    """Shorter side to 37, centre 32x32, ImageNet normalisation: float64 (1, 3, 32, 32)."""
    pixels = plain_pixels(path, 37) / 255
    normal = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(normal).permute(2, 0, 1)[None]


def plain_pixels(path: Path, shorter: int) -> np.ndarray:
    """Resized and cropped by torchvision: float64 (32, 32, 3), 0 to 255."""
    picture = center_crop(resize(Image.open(path).convert("RGB"), [shorter]), [32, 32])
    return np.asarray(picture, dtype=np.float64)


def plain_features(bundle: Path, images: Path, ids: list[str]) -> np.ndarray:
    """torchvision's ResNet-18 without its head, in float64."""
    model = models.resnet18(num_classes=3)
    model.load_state_dict(load_file(bundle / "model.safetensors"))
    model.fc = torch.nn.Identity()
    model.double().eval()
    with torch.no_grad():
        return torch.cat([model(plain_input(images / name)) for name in ids]).numpy()


@pytest.mark.parametrize(("unit_rows", "batch_size"), [(2048, 64), (16, 8), (10, 4), (1, 1), (7, 16)])
def test_embed__equals_a_plain_forward_pass(
    bundle: Path, images: Path, tmp_path: Path, unit_rows: int, batch_size: int
) -> None:
    """For units and batches that divide the data and for such that do not."""
    out = tmp_path / "out"
    outcome = api.embed(model=bundle, data=images, out=out, unit_rows=unit_rows, batch_size=batch_size)
    table = read_all(out)
    ids = table["id"].to_pylist()
    assert sorted(ids) == sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    assert table["label"].to_pylist() == [name.split("/")[0] for name in ids]
    assert set(table["split"].to_pylist()) == {"all"}
    expected = plain_features(bundle, images, ids)
    assert np.abs(matrix(table) - expected).max() < 1e-4 * np.abs(expected).max()
    assert outcome.values["rows"] == 57
    assert len(list(out.glob("*.parquet"))) == -(-57 // unit_rows)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["status"], summary["rows"], summary["bad"], summary["dimensions"]) == ("done", 57, 0, 512)


def test_embed__float16_is_the_rounded_float32(bundle: Path, images: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "float16"):
        api.embed(model=bundle, data=images, out=tmp_path / dtype, dtype=dtype)
    full, half = read_all(tmp_path / "float32"), read_all(tmp_path / "float16")
    assert half.schema.field("embedding").type.value_type == pa.float16()
    assert np.array_equal(matrix(half), matrix(full).astype(np.float16))


def test_embed__bf16_is_near_fp32(bundle: Path, images: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        api.embed(model=bundle, data=images, out=tmp_path / precision, precision=precision)
    exact, rough = matrix(read_all(tmp_path / "fp32")), matrix(read_all(tmp_path / "bf16"))
    error = np.linalg.norm(rough - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05  # not equal: it did compute in bf16


def test_embed__a_chain_gives_what_its_head_reads(bundle: Path, images: Path, tmp_path: Path) -> None:
    """The transform of an aligned model is part of its features."""
    network, config = load_bundle(bundle)
    scale = Scale(512)
    scale.weight.uniform_(0.5, 2)
    scale.bias.normal_()
    chain = Chain(network, [scale], torch.nn.Linear(512, 3))
    description = {
        "type": "chain",
        "backbone": describe_network("resnet18", 3),
        "transforms": [scale.describe()],
        "head": {"in": 512, "out": 3},
    }
    save_bundle(tmp_path / "chain", chain, type(config)(description, config.classes, config.preprocessing))
    api.embed(model=tmp_path / "chain", data=images, out=tmp_path / "out")
    table = read_all(tmp_path / "out")
    plain = plain_features(bundle, images, table["id"].to_pylist())
    expected = plain * scale.weight.numpy() + scale.bias.numpy()
    assert np.abs(matrix(table) - expected).max() < 1e-4 * np.abs(expected).max()


def test_embed__package_equals_numpy(
    package: Path, projection: np.ndarray, images: Path, tmp_path: Path
) -> None:
    api.embed(model=package, data=images, out=tmp_path / "out", unit_rows=10, batch_size=4)
    table = read_all(tmp_path / "out")
    assert len(table) == 57
    for name, vector in zip(table["id"].to_pylist(), matrix(table)):
        expected = plain_pixels(images / name, 32).reshape(-1, 3).mean(0) @ projection
        np.testing.assert_allclose(vector, expected, rtol=1e-4, atol=1e-2)


def test_embed__splits_and_missing_labels(package: Path, tmp_path: Path) -> None:
    """All splits unless one is asked for; no label column where nothing has a label."""
    data = tmp_path / "data"
    make_images(data / "train", {"a": 5, "b": 4})
    make_images(data / "val", {"a": 3, "b": 2}, seed=1)
    api.embed(model=package, data=data, out=tmp_path / "all", unit_rows=4)
    splits = read_all(tmp_path / "all")["split"].to_pylist()
    assert (splits.count("train"), splits.count("val"), len(splits)) == (9, 5, 14)
    api.embed(model=package, data={"path": data, "split": "val"}, out=tmp_path / "val")
    assert read_all(tmp_path / "val")["split"].to_pylist() == ["val"] * 5
    loose = tmp_path / "loose"
    loose.mkdir()
    for number in range(6):
        picture = class_image(number, np.random.default_rng(number))
        (loose / f"{number}.png").write_bytes(encode(picture))
    api.embed(model=package, data=loose, out=tmp_path / "out")
    assert read_all(tmp_path / "out").column_names == ["id", "embedding", "split"]


def test_embed__parquet_domain_through_many_threads(
    package: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small row groups, a cache of a few, eight threads: the vectors of the same files in folders."""
    monkeypatch.setattr("tldist.domain.parquet.CACHE_BYTES", 20_000)
    paths = sorted(images.rglob("*.png"))
    table = pa.table(
        {
            "id": [str(path.relative_to(images)) for path in paths],
            "image": [path.read_bytes() for path in paths],
            "label": [path.parent.name for path in paths],
        }
    )
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=3)
    api.embed(model=package, data=tmp_path / "images.parquet", out=tmp_path / "a", batch_size=32, workers=8)
    api.embed(model=package, data=images, out=tmp_path / "b", batch_size=32)
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    by_id = dict(zip(second["id"].to_pylist(), zip(second["label"].to_pylist(), matrix(second))))
    for name, label, vector in zip(first["id"].to_pylist(), first["label"].to_pylist(), matrix(first)):
        assert label == by_id[name][0]
        assert np.array_equal(vector, by_id[name][1])


# -- broken images ---------------------------------------------------------------------------------------


@pytest.fixture
def broken(images: Path, tmp_path: Path) -> Path:
    """The images, three of them broken."""
    data = shutil.copytree(images, tmp_path / "broken")
    (data / "1" / "3.png").write_bytes(b"not an image")
    (data / "2" / "0.png").write_bytes(b"")
    whole = (data / "10" / "19.png").read_bytes()
    (data / "10" / "19.png").write_bytes(whole[: len(whole) // 2])
    return data


def test_embed__broken_images_are_absent_and_listed(
    bundle: Path, images: Path, broken: Path, tmp_path: Path
) -> None:
    """The other rows keep their vectors."""
    settings = {"model": bundle, "unit_rows": 10, "batch_size": 4}
    outcome = api.embed(data={"path": broken, "max_bad": 0.1}, out=tmp_path / "a", **settings)
    api.embed(data=images, out=tmp_path / "b", **settings)
    names = {"1/3.png", "2/0.png", "10/19.png"}
    assert (outcome.values["rows"], outcome.values["bad"]) == (54, 3)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "a" / "units").iterdir())]
    listed = {entry["id"]: entry["reason"] for record in records for entry in record["bad"]}
    assert set(listed) == names
    assert "empty" in listed["2/0.png"]
    first, second = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    assert first["id"].to_pylist() == [name for name in second["id"].to_pylist() if name not in names]
    kept = [name not in names for name in second["id"].to_pylist()]
    assert np.array_equal(matrix(first), matrix(second)[kept])


def test_embed__too_many_broken_images(package: Path, broken: Path, tmp_path: Path) -> None:
    """The error names the first and the count; what was done is kept."""
    with pytest.raises(DomainError, match=r"3 of 57 images are broken.*first is 1/3\.png"):
        api.embed(model=package, data=broken, out=tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["status"] == "failed"
    outcome = api.embed(model=package, data={"path": broken, "max_bad": 0.1}, out=tmp_path / "out")
    assert outcome.values["rows"] == 54


def test_embed__a_unit_of_broken_images_is_an_empty_part(package: Path, broken: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    api.embed(model=package, data={"path": broken, "max_bad": 0.1}, out=out, unit_rows=1)
    assert sum(pq.read_metadata(path).num_rows == 0 for path in out.glob("*.parquet")) == 3
    assert len(read_all(out)) == 54


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"unit_rows": 20}, "unit_rows=10 .now 20."),
        ({"batch_size": 5}, "batch_size=4"),
        ({"dtype": "float16"}, "dtype=float32 .now float16."),
        ({"data": "limited"}, "another data"),
        ({"model": "bundle"}, "another model.*another preprocessing|engine=onnx"),
    ],
)
def test_embed__refuses_vectors_of_another_kind(
    package: Path, bundle: Path, images: Path, tmp_path: Path, change: dict[str, object], named: str
) -> None:
    """The error names what differs, and the folder stays as it was."""
    settings = {"model": package, "data": images, "out": tmp_path / "out", "unit_rows": 10, "batch_size": 4}
    api.embed(**settings)
    before = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}
    if change.get("data"):
        change = {"data": {"path": images, "limit": 9}}
    if change.get("model"):
        change = {"model": bundle}
    with pytest.raises(RecipeError, match=named):
        api.embed(**{**settings, **change})
    after = {path: path.read_bytes() for path in sorted((tmp_path / "out").rglob("*")) if path.is_file()}
    assert after == before


def test_embed__refuses_a_folder_of_other_files(package: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    with pytest.raises(RecipeError, match="not a folder of vectors"):
        api.embed(model=package, data=images, out=tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["letter.txt"]


def test_embed__wrong_models(logits_package: Path, images: Path, package: Path, tmp_path: Path) -> None:
    """Each error says what to do; no folder is made."""
    out = tmp_path / "out"
    with pytest.raises(PackageError, match="output=features"):
        api.embed(model=logits_package, data=images, out=out)
    with pytest.raises(BundleError, match="bundle"):
        api.embed(model="resnet18", data=images, out=out)
    with pytest.raises(RecipeError, match="precision=bf16"):
        api.embed(model=package, data=images, out=out, precision="bf16")
    with pytest.raises(RecipeError, match="data"):
        api.embed(model=package, out=out)
    assert not out.exists()
