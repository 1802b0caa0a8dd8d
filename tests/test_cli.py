"""The command line from outside: exit codes, the verdict as JSON, dry runs, what errors look like."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import tldist
from tests.support import run_python, run_tldist
from tldist import stages
from tldist.cli import main
from tldist.errors import CheckFailed, Preempted, RecipeError, TldistError
from tldist.recipe import Recipe
from tldist.runs import Outcome
from tldist.stages import STAGES, Stage


class ProbeRecipe(Recipe):
    """A stage of this test."""

    how: str = "well"
    """How it ends."""


ENDINGS: dict[str, Callable[[], Outcome]] = {
    "well": lambda: Outcome("probe", Path("runs/x"), {"accuracy": 0.5}, "all is well", "tldist export x"),
    "failed": lambda: Outcome("probe", passed=False),
    "wrong": lambda: _raise(RecipeError("found this, expected that, do so")),
    "check": lambda: _raise(CheckFailed("parity is off")),
    "preempted": lambda: _raise(Preempted("saved")),
    "interrupted": lambda: _raise(KeyboardInterrupt()),
    "lost": lambda: _raise(RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")),
    "bug": lambda: _raise(ZeroDivisionError("a bug")),
}


def _raise(error: BaseException) -> Outcome:
    raise error


def probe(recipe: ProbeRecipe) -> Outcome:
    """The work of the test's stage."""
    return ENDINGS[recipe.how]()


@pytest.fixture
def probe_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage `probe` in the table, found by dotted names as the real ones are."""
    monkeypatch.setitem(sys.modules, "probe_module", sys.modules[__name__])
    stage = Stage("a probe", "", "probe_module:ProbeRecipe", "probe_module:probe", "train")
    monkeypatch.setitem(stages.STAGES, "probe", stage)


pytestmark = pytest.mark.usefixtures("probe_stage")


# -- exit codes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code", "where", "text"),
    [
        ("well", 0, "out", "all is well"),
        ("failed", 1, "out", ""),
        ("check", 1, "err", "error: parity is off"),
        ("wrong", 2, "err", "error: found this, expected that, do so"),
        ("preempted", 75, "err", "saved"),
        ("interrupted", 130, "err", "run the same command again"),
        ("lost", 1, "err", "lost contact with another process"),
    ],
)
def test_exit__code_and_words(
    how: str, code: int, where: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["probe", f"how={how}"]) == code
    captured = capsys.readouterr()
    assert text in getattr(captured, where)
    assert "Traceback" not in captured.err
    if code:
        assert len(captured.err.splitlines()) <= 2


def test_exit__a_bug_is_not_dressed_up_as_a_mistake_of_the_person() -> None:
    with pytest.raises(ZeroDivisionError):
        main(["probe", "how=bug"])


@pytest.mark.parametrize("how", ["wrong", "interrupted", "lost"])
def test_debug__shows_the_traceback(how: str) -> None:
    with pytest.raises((TldistError, KeyboardInterrupt, RuntimeError)):
        main(["probe", f"how={how}", "--debug"])


def test_exit__of_a_real_process_with_and_without_debug() -> None:
    plain = run_tldist("doctor", "nonsense=1")
    assert (plain.returncode, plain.stdout) == (2, "")
    assert plain.stderr.startswith("error: unknown setting 'nonsense'")
    assert "Traceback" not in plain.stderr
    debug = run_tldist("doctor", "nonsense=1", "--debug")
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr
    assert "RecipeError" in debug.stderr


def test_exit__unknown_command_gets_the_close_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetun", "data=x"]) == 2
    assert "unknown command 'finetun'. Did you mean: finetune?" in capsys.readouterr().err


def test_exit__unknown_flag_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["probe", "--verbose"])
    assert stop.value.code == 2
    assert "--verbose" in capsys.readouterr().err


# -- what is printed -----------------------------------------------------------------------------------


def test_json__is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "next:   tldist export x" in lines
    assert json.loads(lines[-1]) == {
        "stage": "probe",
        "status": "done",
        "out": str(Path("runs/x")),
        "accuracy": 0.5,
    }


def test_json__says_when_a_check_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "probe", "how=failed"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["status"] == "failed"


def test_dry_run__prints_the_resolved_recipe_and_does_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    code = main(["finetune", "data=nowhere", "model=resnet18", f"out={out}", "epochs=3", "--dry-run"])
    assert code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert (resolved["epochs"], resolved["data"]["path"], resolved["optimizer"]["name"]) == (
        3,
        "nowhere",
        "adamw",
    )
    assert not out.exists()


def test_dry_run__wrong_settings_are_still_wrong() -> None:
    assert main(["finetune", "data=nowhere", "model=m", "out=o", "epochs=none", "--dry-run"]) == 2


def test_flags__may_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["--dry-run", "probe", "how=x"],
        ["probe", "--dry-run", "how=x"],
        ["probe", "how=x", "--dry-run"],
    ):
        assert main(arguments) == 0
        assert capsys.readouterr().out == "how: x\n"


def test_help__lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and stage.sentence in text for name, stage in STAGES.items())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tldist {tldist.__version__}\n"


# -- what is missing -----------------------------------------------------------------------------------

WITHOUT = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from tldist.cli import main
sys.exit(main(sys.argv[2:]))
"""


def run_without(missing: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process in which some libraries cannot be imported."""
    return run_python(WITHOUT, missing, *arguments)


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("torch,torchvision,accelerate", ["finetune", "data=D", "model=m", "out=o"], "train"),
        ("torch,torchvision,accelerate", ["models"], "train"),
        ("jinja2", ["report", "RUN", "out=r.html"], "report"),
        ("pyarrow", ["embed", "m", "data=D", "out=o"], "embed"),
        ("sklearn", ["demo", "out=o"], "demo"),
    ],
)
def test_missing__library_names_the_pip_line(missing: str, arguments: list[str], extra: str) -> None:
    answer = run_without(missing, *arguments)
    assert answer.returncode == 2, answer.stderr
    assert f"Install it with: pip install 'tldist[{extra}]'" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_ranks__an_error_says_whose_it_is() -> None:
    answer = run_tldist("doctor", "nonsense=1", env={"RANK": "3", "WORLD_SIZE": "4"})
    assert answer.returncode == 2
    assert answer.stderr.startswith("[rank 3 on ")


def test_ranks__only_the_main_process_prints_the_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["probe", "--json"]) == 0
    assert capsys.readouterr().out == ""
