"""Profiles: found by name or path, and refused in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from tldist.errors import RecipeError
from tldist.export.profile import find_profile
from tldist.share import find_shared

SHIPPED = sorted(file.stem for file in find_shared("export/profiles").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_profile__every_shipped_one_loads(name: str) -> None:
    assert find_profile(name).name == name


def test_profile__by_path(tmp_path: Path) -> None:
    text = (find_shared("export/profiles") / "cpu-fp32.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("opset: none", "opset: 21"))
    profile = find_profile(str(tmp_path / "mine.yaml"))
    assert (profile.name, profile.opset) == ("mine", 21)
    assert profile.tolerances == find_profile("cpu-fp32").tolerances


def test_profile__unknown_name_gets_the_close_ones() -> None:
    with pytest.raises(RecipeError, match=r"unknown profile 'cpu-fp23'.*cpu-fp32"):
        find_profile("cpu-fp23")


def test_profile__missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such profile file"):
        find_profile(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("precison: fp32", "precison.*precision"),
        ("precision: fp64", "precision.*fp32"),
        ("tolerances: {max_relative: 0, min_cosine: 1, max_flipped: 0}", "tolerances.max_relative"),
        ("precision: [", "not valid YAML"),
    ],
)
def test_profile__malformed_names_the_file_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"p\.yaml") as error:
        find_profile(str(tmp_path / "p.yaml"))
    assert error.match(words)
