"""The grammar of settings: what is an input, what is a setting, how text becomes a value, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field

from tldist.errors import RecipeError
from tldist.finetune.recipe import FinetuneRecipe
from tldist.fuse.recipe import FuseRecipe
from tldist.recipe import Extendable, Free, Recipe, check_same_run, is_setting, read_recipe


class Place(Recipe):
    """A nested recipe with a shorthand."""

    shorthand: ClassVar[str] = "path"

    path: str
    """Where."""
    limit: int | None = Field(default=None, ge=1)
    """How many."""


class Deep(Recipe):
    """A nested recipe without a shorthand."""

    lr: float = 0.1
    """Rate."""


class Sample(Recipe):
    """All kinds of fields."""

    inputs: ClassVar[tuple[str, ...]] = ("first", "rest*")

    first: Path = Path("none-given")
    """One input."""
    rest: tuple[str, ...] = ()
    """All other inputs."""
    out: Path = Path("runs")
    """A path."""
    name: str = "x"
    """Text."""
    count: int = 3
    """A number."""
    share: float = 0.5
    """Another."""
    flag: bool = False
    """Yes or no."""
    maybe: int | None = 7
    """Perhaps."""
    numbers: tuple[float, ...] = ()
    """Several."""
    place: Place | None = None
    """Nested, optional."""
    deep: Deep = Deep()
    """Nested."""
    epochs: Extendable[int] = 1
    """May grow."""
    workers: Free[int] = 0
    """May change."""


# -- inputs and settings -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("runs/lr=0.1/bundle", False),
        ("lr=0.1", True),
        ("optimizer.lr=1e-3", True),
        ("LR=0.1", False),
        ("./a=b", False),
        ("=x", False),
        ("a-b=c", False),
        ("out=", True),
        ("data=s3://bucket/a=b/c", True),
        ("bundle", False),
    ],
)
def test_is_setting__only_by_what_stands_before_the_first_equals(argument: str, expected: bool) -> None:
    assert is_setting(argument) is expected


def test_read__a_path_with_an_equals_sign_is_an_input() -> None:
    recipe = read_recipe(Sample, ["runs/lr=0.1/bundle", "name=a=b"])
    assert recipe.first == Path("runs/lr=0.1/bundle")
    assert recipe.name == "a=b"


def test_read__shorthand_sets_the_nested_path() -> None:
    assert read_recipe(Sample, ["place=photos"]).place == Place(path="photos")
    assert read_recipe(Sample, ["place=photos", "place.limit=5"]).place == Place(path="photos", limit=5)
    assert read_recipe(FinetuneRecipe, ["data=photos", "model=m", "out=o"]).data.path == "photos"


def test_read__same_key_twice_is_an_error_shorthand_included() -> None:
    with pytest.raises(RecipeError, match="'name' is given twice: 'a' and 'b'"):
        read_recipe(Sample, ["name=a", "name=b"])
    with pytest.raises(RecipeError, match=r"'place.path' is given twice"):
        read_recipe(Sample, ["place=a", "place.path=b"])


def test_read__an_input_and_a_setting_for_the_same_field_is_an_error() -> None:
    with pytest.raises(RecipeError, match="'first' is given twice"):
        read_recipe(Sample, ["somewhere", "first=elsewhere"])


def test_read__the_star_takes_all_the_rest_and_nothing_else_takes_more() -> None:
    recipe = read_recipe(Sample, ["a", "b", "c"])
    assert recipe.first == Path("a")
    assert recipe.rest == ("b", "c")
    assert read_recipe(FuseRecipe, ["a", "b", "method=average", "out=o"]).bundles == (Path("a"), Path("b"))
    with pytest.raises(RecipeError, match=r"unexpected input 'photos' .*key=value"):
        read_recipe(FinetuneRecipe, ["photos", "model=m", "out=o"])


# -- values by the field's type ------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["2024", "1e3", "true", "none", "0x10", "~x", "a,b", "1_000", "12:30:00"])
def test_values__text_and_paths_stay_as_typed(text: str) -> None:
    recipe = read_recipe(Sample, [f"out={text}", f"name={text}"])
    assert recipe.out == Path(text)
    assert recipe.name == text


def test_values__numbers_flags_lists_and_none() -> None:
    recipe = read_recipe(
        Sample, ["count=12", "share=1e-3", "flag=true", "maybe=none", "numbers=0.5, 2,3", "rest=a,b"]
    )
    assert (recipe.count, recipe.share, recipe.flag, recipe.maybe) == (12, 0.001, True, None)
    assert recipe.numbers == (0.5, 2.0, 3.0)
    assert recipe.rest == ("a", "b")


@pytest.mark.parametrize("setting", ["count=1.5", "count=many", "flag=maybe", "share=", "numbers=1,x"])
def test_values__of_the_wrong_type_name_key_and_value(setting: str) -> None:
    key, _, value = setting.partition("=")
    with pytest.raises(RecipeError) as caught:
        read_recipe(Sample, [setting])
    assert str(caught.value).startswith(key)
    assert "found" in str(caught.value)
    assert value.split(",")[-1] in str(caught.value)


def test_values__recipes_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Sample().count = 4  # type: ignore[misc]


# -- unknown keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "hint"),
    [
        ("epoch=3", "epochs"),
        ("lr=0.1", "optimizer.lr"),
        ("optimizer.learning=1", "optimizer"),
        ("batchsize=3", "batch_size"),
        ("data.limits=3", "data.limit"),
    ],
)
def test_unknown__setting_gets_the_close_matches(setting: str, hint: str) -> None:
    with pytest.raises(RecipeError, match="unknown setting") as caught:
        read_recipe(FinetuneRecipe, ["data=D", "model=m", "out=o", setting])
    assert hint in str(caught.value)


def test_unknown__key_of_a_file_is_refused_too(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("data: D\nmodel: m\nout: o\noptimizer:\n  rate: 1\n")
    with pytest.raises(RecipeError, match=r"unknown setting 'optimizer.rate'"):
        read_recipe(FinetuneRecipe, [str(file)])


def test_missing__setting_is_named_with_its_sentence() -> None:
    with pytest.raises(RecipeError, match="the setting 'model' is missing: A torchvision name"):
        read_recipe(FinetuneRecipe, ["data=D", "out=o"])


# -- files ---------------------------------------------------------------------------------------------


def test_file__command_line_wins_over_it_and_later_files_over_earlier(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yml"
    one.write_text("name: one\ncount: 1\nplace: photos\nout: 2024\n")
    two.write_text("count: 2\nplace:\n  limit: 9\n")
    recipe = read_recipe(Sample, [str(one), str(two), "name=typed"])
    assert (recipe.name, recipe.count, recipe.out) == ("typed", 2, Path("2024"))
    assert recipe.place == Place(path="photos", limit=9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: &x a\nplace: *x\n", "aliases"),
        ("name: a\nname: b\n", r"'name' is given twice \(line 2\)"),
        ("deep:\n  lr: 1\n  lr: 2\n", "'lr' is given twice"),
        ("- a\n- b\n", "expected 'key: value' lines, found a list"),
        ("name: [a\n", "not valid YAML"),
        ("name: !!python/object/apply:os.system ['true']\n", r"name"),
        ("a: " * 3000, r"r\.yaml: not valid YAML"),
        ("[" * 5000, r"r\.yaml"),
    ],
)
def test_file__what_is_not_a_recipe_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError, match=message):
        read_recipe(Sample, [str(file)])


def test_file__missing_or_not_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing\.yaml: cannot be read"):
        read_recipe(Sample, [str(tmp_path / "nothing.yaml")])
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00name: a")
    with pytest.raises(RecipeError, match=r"binary\.yaml"):
        read_recipe(Sample, [str(tmp_path / "binary.yaml")])


def test_file__empty_means_defaults(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("# nothing\n")
    assert read_recipe(Sample, [str(tmp_path / "r.yaml")]) == Sample()


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    recipe=st.builds(
        Sample,
        first=TEXTS.filter(bool).map(lambda text: Path("d") / text.strip("/")),
        rest=st.lists(TEXTS, max_size=3).map(tuple),
        name=TEXTS,
        count=st.integers(),
        share=st.floats(allow_nan=False, allow_infinity=False),
        flag=st.booleans(),
        maybe=st.none() | st.integers(),
        numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(tuple),
        place=st.none() | st.builds(Place, path=TEXTS, limit=st.none() | st.integers(1, 99)),
    )
)
def test_file__written_and_read_again_is_equal(tmp_path: Path, recipe: Sample) -> None:
    file = tmp_path / "again.yaml"
    recipe.write(file)
    assert read_recipe(Sample, [str(file)]) == recipe


def test_file__resolved_recipe_of_a_stage_is_equal_again(tmp_path: Path) -> None:
    recipe = read_recipe(
        FinetuneRecipe, ["data=D", "model=m", "out=2024", "augment.crop=none", "optimizer.clip=1", "seed=3"]
    )
    recipe.write(tmp_path / "recipe.yaml")
    assert read_recipe(FinetuneRecipe, [str(tmp_path / "recipe.yaml")]) == recipe
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["optimizer"]["clip"] == 1.0


# -- starting again with the same out ------------------------------------------------------------------


def test_same_run__identity_is_refused_extendable_grows_free_changes() -> None:
    old = Sample(epochs=2)
    check_same_run(Path("run"), old, Sample(epochs=5, workers=4))
    with pytest.raises(RecipeError, match=r"epochs=2; it may grow, not shrink to 1"):
        check_same_run(Path("run"), old, Sample(epochs=1))
    with pytest.raises(RecipeError, match=r"run was made with deep\.lr=0\.1, now it is deep\.lr=0\.2"):
        check_same_run(Path("run"), old, Sample(epochs=2, deep={"lr": 0.2}))
