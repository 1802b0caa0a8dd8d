"""The demo from outside: every step runs, the table is what was measured, a second start goes on."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from tests.support import run_tldist
from tldist.demo.commands import as_words, command
from tldist.demo.recipe import DemoRecipe
from tldist.demo.story import FUSED, PROBE, SCRATCH, Story
from tldist.demo.table import best_row, make_table, show_table
from tldist.errors import TldistError
from tldist.finetune.recipe import FinetuneRecipe
from tldist.fuse.recipe import FuseRecipe
from tldist.recipe import read_recipe

WORDS = ["quick=true", "draws=2", "printed=20"]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the output of a whole demo, trained next to nothing."""
    out = tmp_path_factory.mktemp("demo") / "run"
    answer = run_tldist("demo", *WORDS, f"out={out}", "--json")
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-3000:]
    return out, answer.stdout


@pytest.mark.launcher
def test_demo__steps_are_commands_and_the_end_is_table_and_parity(told: tuple[Path, str]) -> None:
    out, text = told
    stages = re.findall(r"^\$ tldist (\w+)", text, re.MULTILINE)
    adapted = ["finetune"] * 3 + ["fuse", "align"] + ["finetune"] * 4
    assert stages == [*adapted, "export", "parity", "parity", "embed", "report"]
    assert re.search(
        r"^\$ accelerate launch --config_file \S+cpu-2.yaml -m tldist finetune data=", text, re.MULTILINE
    )
    assert re.search(r"processes +2 on", text), "the base model was trained by two processes"
    lines = text.splitlines()
    assert "parity: PASS" in lines[-6:]
    assert f"report: {out / 'report.html'}" in lines
    assert (out / "report.html").stat().st_size > 10_000


@pytest.mark.launcher
def test_demo__table_is_what_was_measured(told: tuple[Path, str]) -> None:
    out, text = told
    table = json.loads((out / "table.json").read_text())
    verdict = json.loads(text.splitlines()[-1])
    assert verdict["table"] == table
    assert len(table) == 7
    for row in table:
        assert len(row["draws"]) == 2
        assert row["mean"] == pytest.approx(statistics.fmean(row["draws"]))
        assert row["std"] == pytest.approx(statistics.stdev(row["draws"]))
        assert f"{row['method']} " in text
    # measured once more, from outside
    story = Story(DemoRecipe.make(out=out, quick=True, draws=2, printed=20))
    bundle = story.trainings(1)[FUSED]["out"] / "bundle"
    again = run_tldist("evaluate", bundle, f"data={story.target(1)}", "--json")
    accuracy = json.loads(again.stdout.splitlines()[-1])["accuracy"]
    assert next(row for row in table if row["method"] == FUSED)["draws"][1] == pytest.approx(
        accuracy, abs=1e-9
    )


@pytest.mark.launcher
def test_demo__a_second_start_says_that_it_is_finished(told: tuple[Path, str]) -> None:
    out, text = told
    again = run_tldist("demo", *WORDS, f"out={out}")
    assert again.returncode == 0
    assert "is finished already" in again.stdout
    assert "$ " not in again.stdout
    table = text[text.index("\nmethod ") :].split("\n\n")[0]
    assert table in again.stdout
    other = run_tldist("demo", *WORDS, f"out={out}", "seed=1")
    assert other.returncode == 2
    assert "seed" in other.stderr


def test_commands__settings_as_typed_mean_the_same_as_settings_as_keywords() -> None:
    story = Story(DemoRecipe())
    for settings in [story.base(), story.source("sans"), *story.trainings(2).values()]:
        assert read_recipe(FinetuneRecipe, as_words(settings)) == FinetuneRecipe.make(**settings)
    fusion: dict[str, Any] = story.fusion(1)
    typed = read_recipe(FuseRecipe, ["a", "b", *as_words(fusion)])
    assert typed == FuseRecipe.make(bundles=["a", "b"], **fusion)


def test_commands__a_step_that_fails_stops_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TldistError, match=r"the step 'fuse' ended with exit code 2"):
        command("fuse", "nowhere", method="average", out="nothing")
    captured = capsys.readouterr()
    assert captured.out.startswith("$ tldist fuse nowhere method=average out=nothing")
    assert captured.err.startswith("error: nowhere")


def test_story__every_method_has_its_own_run_and_the_same_labels() -> None:
    story = Story(DemoRecipe())
    trainings = story.trainings(1)
    assert len({str(settings["out"]) for settings in trainings.values()}) == len(trainings)
    assert {settings["data"] for settings in trainings.values()} == {story.target(1)}
    assert trainings[SCRATCH]["weights"] == "none"
    assert len({settings["epochs"] for settings in trainings.values()}) == 1, "the same effort for each"
    assert trainings[PROBE]["train"] == "head"


def test_table__mean_spread_and_winner() -> None:
    rows = make_table({"a": [0.5, 0.7], "b": [0.9, 0.9], "c": [1.0, 1.0]})
    assert rows[0] == {"method": "a", "mean": 0.6, "std": pytest.approx(0.02**0.5), "draws": [0.5, 0.7]}
    assert best_row(rows, ["a", "b"])["method"] == "b"
    assert "b      50  0.900  0.000" in show_table(rows, {"a": 50, "b": 50, "c": 0})
    assert make_table({"a": [0.5]})[0]["std"] == 0.0
