"""Domains: folders and Parquet, splits, classes by name, samples by id."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support import class_image, encode, make_images
from tldist.domain import DataRecipe, open_domain
from tldist.errors import DomainError
from tldist.runtime.decode import BadImage


def names(domain) -> list[str]:  # type: ignore[no-untyped-def]
    return [domain.classes[label] for label in domain.labels]


def test_folder__classes_in_the_order_people_expect(tmp_path: Path) -> None:
    domain = open_domain(make_images(tmp_path / "d", {str(n): 1 for n in range(1, 13)}))
    assert domain.classes == tuple(str(n) for n in range(1, 13))
    assert [domain.id(i).split("/")[0] for i in range(12)] == names(domain)


def test_folder__splits_by_their_usual_names(tmp_path: Path) -> None:
    for split, count in {"training": 4, "valid": 2, "test": 3}.items():
        make_images(tmp_path / "d" / split, {"x": count, "y": count})
    domain = open_domain(tmp_path / "d")
    assert domain.split_counts == {"train": 8, "val": 4, "test": 6}
    assert len(domain.split("validation")) == 4
    assert len(domain.evaluation_split()) == 6
    with pytest.raises(DomainError, match=r"no split 'dev2'.*train, val, test"):
        domain.split("dev2")


def test_folder__images_below_a_class_folder_belong_to_the_class(tmp_path: Path) -> None:
    make_images(tmp_path / "d" / "cat", {"deep": 2})
    make_images(tmp_path / "d", {"dog": 1})
    domain = open_domain(tmp_path / "d")
    assert names(domain) == ["cat", "cat", "dog"]


def test_folder__without_classes_has_no_labels(tmp_path: Path) -> None:
    make_images(tmp_path, {"d": 3})
    domain = open_domain(tmp_path / "d")
    assert len(domain) == 3
    assert not domain.has_labels


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda d: None, "no such folder"),
        (lambda d: d.mkdir(), "no images found"),
        (lambda d: (make_images(d, {"a": 2}), (d / "b").mkdir()), "'b' has no images"),
        (lambda d: (make_images(d, {"a": 2}), (d / "1.png").write_bytes(b"x")), "outside the class folders"),
        (lambda d: (make_images(d / "val", {"a": 1}), make_images(d / "valid", {"a": 1})), "several folders"),
        (lambda d: (make_images(d / "train", {"a": 1}), make_images(d, {"b": 1})), "'b' lies beside train"),
        (lambda d: d.write_text("hello"), "expected a folder of images"),
    ],
)
def test_folder__what_is_wrong_is_named(tmp_path: Path, build, message: str) -> None:  # type: ignore[no-untyped-def]
    build(tmp_path / "d")
    with pytest.raises(DomainError, match=message):
        open_domain(tmp_path / "d")


def test_limit__is_spread_over_the_classes_and_the_same_each_time(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", {"a": 30, "b": 3, "c": 30})
    chosen = open_domain(DataRecipe.make(path=str(folder), limit=12))
    counts = {name: names(chosen).count(name) for name in "abc"}
    assert sum(counts.values()) == 12
    assert counts["b"] == 3
    assert abs(counts["a"] - counts["c"]) <= 1
    again = open_domain(DataRecipe.make(path=str(folder), limit=12))
    assert [again.id(i) for i in range(12)] == [chosen.id(i) for i in range(12)]


def test_carve__every_class_by_id_disjoint_and_stable(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "d", {"a": 20, "b": 10, "single": 1})
    rest, held = open_domain(folder).carve(0.3, seed=0)
    ids = [{part.id(i) for i in range(len(part))} for part in (rest, held)]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 31
    assert [names(held).count(name) for name in ("a", "b", "single")] == [6, 3, 0]
    (folder / "a" / "new.png").write_bytes(encode(class_image(0, np.random.default_rng(0))))
    _, later = open_domain(folder).carve(0.3, seed=0)
    assert len({later.id(i) for i in range(len(later))} - ids[1]) <= 2, "one new image moves few others"
    _, other = open_domain(folder).carve(0.3, seed=1)
    assert {other.id(i) for i in range(len(other))} != {later.id(i) for i in range(len(later))}


def test_labels_in__positions_by_name(tmp_path: Path) -> None:
    domain = open_domain(make_images(tmp_path / "d", {"a": 1, "b": 2, "c": 1}))
    assert domain.labels_in(["c", "x", "b", "a"]).tolist() == [3, 2, 2, 0]
    with pytest.raises(DomainError, match="unknown to the model: c"):
        domain.labels_in(["a", "b", "d"])


def test_fingerprint__content_counts_place_does_not(tmp_path: Path) -> None:
    first = open_domain(make_images(tmp_path / "one", {"a": 2, "b": 2}))
    second = open_domain(make_images(tmp_path / "two", {"a": 2, "b": 2}))
    assert first.fingerprint == second.fingerprint
    (tmp_path / "two" / "b" / "9.png").write_bytes(b"12345")
    assert open_domain(tmp_path / "two").fingerprint != first.fingerprint


# -- Parquet ---------------------------------------------------------------------------------------------


def pictures(count: int) -> list[bytes]:
    random = np.random.default_rng(0)
    return [encode(class_image(i % 3, random)) for i in range(count)]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_parquet__bytes_by_row_across_files_and_row_groups(tmp_path: Path) -> None:
    data = pictures(23)
    labels = [f"class{i % 3}" for i in range(23)]
    for number, part in enumerate((slice(0, 9), slice(9, 23))):
        table = pa.table(
            {"image": data[part], "label": labels[part], "id": [f"s{i}" for i in range(23)][part]}
        )
        pq.write_table(table, tmp_path / f"{number}.parquet", row_group_size=4)
    domain = open_domain(tmp_path)
    assert names(domain) == labels
    order = np.random.default_rng(1).permutation(23)
    for row in order:
        assert domain.read(row) == data[row]
        assert domain.id(row) == f"s{row}"
    assert len(open_domain(str(tmp_path / "*.parquet"))) == 23
    assert len(open_domain(tmp_path / "1.parquet")) == 14


def test_parquet__paths_structs_and_class_names_of_datasets(tmp_path: Path) -> None:
    datasets_meta = b'{"info": {"features": {"label": {"names": ["zebra", "ant"], "_type": "ClassLabel"}}}}'
    data = pictures(3)
    (tmp_path / "x.png").write_bytes(data[0])
    images = [
        {"bytes": None, "path": "x.png"},
        {"bytes": data[1], "path": None},
        {"bytes": data[2], "path": "q"},
    ]
    table = pa.table({"image": images, "label": [0, 1, 0]}).replace_schema_metadata(
        {"huggingface": datasets_meta}
    )
    pq.write_table(table, tmp_path / "train-0.parquet")
    domain = open_domain(tmp_path)
    assert domain.classes == ("ant", "zebra")
    assert names(domain) == ["zebra", "ant", "zebra"]
    assert [domain.read(i) for i in range(3)] == data
    assert domain.split_counts == {"train": 3}
    assert domain.id(2) == "train-0.parquet:2"


def test_parquet__what_is_wrong_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b"1"], "label": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DomainError, match=r"no column 'image'.*picture"):
        open_domain(tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"1", b"2"], "id": ["same", "same"]}), tmp_path / "b.parquet")
    with pytest.raises(DomainError, match="repeat in 'id'"):
        open_domain(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DomainError, match=r"c\.parquet: cannot be read as Parquet"):
        open_domain(tmp_path / "c.parquet")
    pq.write_table(pa.table({"image": ["nowhere.png", None]}), tmp_path / "d.parquet")
    domain = open_domain(tmp_path / "d.parquet")
    for row in range(2):
        with pytest.raises(BadImage):
            domain.read(row)


def test_parquet__files_of_one_name_in_two_folders_have_ids_of_their_own(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table({"image": pictures(2)}), tmp_path / folder / "part.parquet")
    domain = open_domain(str(tmp_path / "*" / "part.parquet"))
    assert [domain.id(i) for i in range(4)] == [
        f"{f}/part.parquet:{n}" for f in ("one", "two") for n in (0, 1)
    ]


def test_parquet__other_image_bytes_are_another_domain(tmp_path: Path) -> None:
    prints = []
    for size in ((40, 36), (41, 36)):
        data = [encode(class_image(i, np.random.default_rng(0), size)) for i in range(3)]
        pq.write_table(pa.table({"image": data, "label": ["a", "b", "c"]}), tmp_path / "d.parquet")
        prints.append(open_domain(tmp_path / "d.parquet").fingerprint)
    assert prints[0] != prints[1]
