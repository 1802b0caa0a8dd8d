"""Several domains as one: classes by name, splits side by side, each sample once, by its own name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import make_images, make_splits
from tldist.domain import DataRecipe, open_domain
from tldist.errors import DomainError


def test_join__classes_are_matched_by_name(tmp_path: Path) -> None:
    first = make_images(tmp_path / "first", {"cat": 3, "emu": 2})
    second = make_images(tmp_path / "second", {"bee": 2, "cat": 4}, seed=1)
    joined = open_domain(DataRecipe.make(path=str(first), also=[str(second)]))
    assert joined.classes == ("bee", "cat", "emu")
    assert len(joined) == 11
    for index in range(len(joined)):
        folder, label, name = joined.id(index).split("/")
        assert joined.classes[joined.labels[index]] == label
        assert joined.read(index) == (tmp_path / folder / label / name).read_bytes()
    assert len({joined.id(index) for index in range(11)}) == 11


def test_join__splits_stay_what_they_are(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_splits(tmp_path / name / "images", {"a": 3, "b": 2}, {"a": 1, "b": 1})
    paths = [str(tmp_path / name / "images") for name in ("first", "second")]
    joined = open_domain(DataRecipe.make(path=paths[0], also=paths[1]))
    assert joined.split_counts == {"train": 10, "val": 4}
    assert {joined.id(i).split("/")[0] for i in range(14)} == {"images-1", "images-2"}
    assert open_domain(DataRecipe.make(path=paths[0], also=paths[1], limit=4)).split_counts == {
        "train": 4,
        "val": 4,
    }


def test_join__splits_and_none_cannot_be_joined(tmp_path: Path) -> None:
    first = make_splits(tmp_path / "first", {"a": 3, "b": 2}, {"a": 1, "b": 1})
    second = make_images(tmp_path / "second", {"a": 3, "b": 2})
    with pytest.raises(DomainError, match=r"second has no splits, and .*first has"):
        open_domain(DataRecipe.make(path=str(first), also=[str(second)]))


def test_join__one_of_them_missing_says_which(tmp_path: Path) -> None:
    first = make_images(tmp_path / "first", {"a": 3, "b": 2})
    with pytest.raises(DomainError, match="nowhere: no such folder"):
        open_domain(DataRecipe.make(path=str(first), also=[str(tmp_path / "nowhere")]))
