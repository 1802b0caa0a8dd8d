"""A sealed domain: no labels, and nothing about it that depends on them."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import encode, make_images
from tldist.domain import DataRecipe, Domain, open_domain, seal


def contents(domain: Domain) -> list[str]:
    return [hashlib.sha256(domain.read(i)).hexdigest() for i in range(len(domain))]


def shuffled(folder: Path, out: Path) -> Path:
    """The same images, each in the folder of another class: by one class further, or two."""
    names = sorted(path.name for path in folder.iterdir())
    for file in sorted(folder.rglob("*.png")):
        place = names.index(file.parent.name) + 1 + int(file.stem) % 2
        to = out / names[place % len(names)] / file.name
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(file.read_bytes())
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_images(tmp_path / "d", {"cat": 7, "dog": 4, "emu": 5})


def test_seal__has_no_labels_and_no_classes(folder: Path) -> None:
    sealed = seal(open_domain(folder))
    assert not sealed.has_labels
    assert sealed.classes == ()
    assert sealed.used_classes == ()
    assert set(sealed.labels_in(("cat", "dog", "emu")).tolist()) == {-1}
    assert sorted(contents(sealed)) == sorted(contents(open_domain(folder)))
    assert not any(name in sealed.id(i) for i in range(len(sealed)) for name in ("cat", "dog", "emu"))
    assert len({sealed.id(i) for i in range(len(sealed))}) == 16


def test_seal__labels_lie_nowhere_in_it(folder: Path) -> None:
    sealed = seal(open_domain(folder))
    assert sealed.tags is None
    assert set(sealed.labels.tolist()) == {-1}
    assert pickle.loads(pickle.dumps(sealed)).read(3) == sealed.read(3), "decoding processes get it"


def test_seal__order_names_and_limit_do_not_depend_on_the_folders(folder: Path, tmp_path: Path) -> None:
    other = shuffled(folder, tmp_path / "other")
    plain = [open_domain(path).labels.tolist() for path in (folder, other)]
    assert plain[0] != plain[1]
    for limit in (None, 6):
        first, second = (
            open_domain(DataRecipe.make(path=str(path), limit=limit), sealed=True) for path in (folder, other)
        )
        assert contents(first) == contents(second)
        assert [first.id(i) for i in range(len(first))] == [second.id(i) for i in range(len(second))]
    assert contents(open_domain(folder)) != contents(seal(open_domain(folder))), "a folder is in class order"


def test_seal__images_that_are_equal_keep_apart(tmp_path: Path) -> None:
    same = encode(np.full((8, 8, 3), 7, dtype=np.uint8))
    for name in ("a", "b"):
        (tmp_path / "d" / name).mkdir(parents=True)
        (tmp_path / "d" / name / "0.png").write_bytes(same)
    sealed = seal(open_domain(tmp_path / "d"))
    assert len({sealed.id(0), sealed.id(1)}) == 2


def test_seal__keeps_the_splits(tmp_path: Path) -> None:
    make_images(tmp_path / "d" / "train", {"a": 5, "b": 4})
    make_images(tmp_path / "d" / "test", {"a": 2, "b": 1}, seed=3)
    whole, sealed = open_domain(tmp_path / "d"), open_domain(tmp_path / "d", sealed=True)
    for split in ("train", "test"):
        assert sorted(contents(sealed.split(split))) == sorted(contents(whole.split(split)))


def write_parquet(path: Path, labels: list[str]) -> Path:
    pictures = np.random.default_rng(0).integers(0, 255, (len(labels), 8, 8, 3), dtype=np.uint8)
    images = [encode(picture) for picture in pictures]
    pq.write_table(pa.table({"image": images, "label": labels}), path)
    return path


def test_seal__rows_of_parquet_do_not_depend_on_the_label_column(tmp_path: Path) -> None:
    labels = ["x", "y", "y", "z", "x", "y"]
    first = write_parquet(tmp_path / "d.parquet", labels)
    plain = contents(open_domain(DataRecipe.make(path=str(first), limit=4), sealed=True))
    write_parquet(first, ["poison"] * 5 + ["other"])
    assert contents(open_domain(DataRecipe.make(path=str(first), limit=4), sealed=True)) == plain
