"""The run folder: begun, gone on with, refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tldist.errors import RecipeError
from tldist.fuse.recipe import FuseRecipe
from tldist.runs import open_run


def recipe(out: Path, **more: object) -> FuseRecipe:
    return FuseRecipe.make(bundles=["a", "b"], method="average", out=out, **more)


def test_open_run__after_a_kill_before_the_recipe_was_written(tmp_path: Path) -> None:
    out = tmp_path / "run"
    open_run("fuse", out, recipe(out), {"models": "1"})
    (out / "recipe.yaml").unlink()
    (out / ".tmp-0123456789ab-recipe.yaml").write_text("half")
    folder = open_run("fuse", out, recipe(out), {"models": "2"})
    assert not folder.resumed
    assert sorted(file.name for file in out.iterdir()) == ["inputs.json", "recipe.yaml"]
    assert open_run("fuse", out, recipe(out), {"models": "2"}).resumed


def test_open_run__refuses_what_is_not_its_own(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not a tldist run"):
        open_run("fuse", out, recipe(out), {})
    assert (out / "thesis.txt").read_text() == "mine"
    (out / "thesis.txt").unlink()
    open_run("fuse", out, recipe(out), {"models": "1"})
    with pytest.raises(RecipeError, match="other models"):
        open_run("fuse", out, recipe(out), {"models": "2"})
    with pytest.raises(RecipeError, match="method"):
        open_run("fuse", out, recipe(out).replace(method="slerp"), {"models": "1"})
    with pytest.raises(RecipeError, match="holds a run of 'fuse'"):
        open_run("align", out, recipe(out), {})
