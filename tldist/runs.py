"""The run folder: what a stage writes, and how it goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tldist import __version__
from tldist.errors import CheckFailed, Preempted, RecipeError
from tldist.files import read_json, remove_leftovers, write_json, write_text
from tldist.recipe import FREE, Recipe, check_same_run, field_kind, read_yaml

RECIPE = "recipe.yaml"
INPUTS = "inputs.json"
SUMMARY = "summary.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
BUNDLE = "bundle"


@dataclass(frozen=True)
class Outcome:
    """What a stage hands back: to Python as it is, to the command line as text or JSON.

    Attributes:
        stage: its name.
        out: where the result lies, if it wrote one.
        values: the verdict as plain JSON data.
        text: what a person reads at the end.
        next_command: the command that usually comes next.
        passed: False where a check was made and failed (exit code 1).
    """

    stage: str
    out: Path | None = None
    values: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    next_command: str = ""
    passed: bool = True

    def to_json(self) -> str:
        """The verdict as one line of JSON."""
        status = "done" if self.passed else "failed"
        out = str(self.out) if self.out else None
        return json.dumps({"stage": self.stage, "status": status, "out": out, **self.values})


@dataclass(frozen=True)
class RunFolder:
    """A run on disk.

    Attributes:
        path: the folder.
        stage: the stage that writes it.
        resumed: whether an earlier, unfinished start is gone on with.
        finished: whether it was complete already (and the recipe asks for no more).
    """

    path: Path
    stage: str
    resumed: bool = False
    finished: bool = False

    @property
    def summary(self) -> dict[str, Any]:
        """What ``summary.json`` says now; empty where there is none."""
        path = self.path / SUMMARY
        return read_json(path, RecipeError, "run summary") if path.is_file() else {}

    def write_summary(self, status: str, **values: Any) -> None:
        """Write ``summary.json``: status, versions, and what the stage has to say."""
        write_json(
            self.path / SUMMARY,
            {
                "stage": self.stage,
                "status": status,
                "tldist": __version__,
                "python": platform.python_version(),
                "host": platform.node(),
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **values,
            },
        )

    def log(self, **values: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl`` (a kill may have left half a line at the end)."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
        return lines

    def rewind_metrics(self, step: int) -> None:
        """Drop the lines after ``step``: they will be written again."""
        kept = [line for line in self.read_metrics() if line.get("step", 0) <= step]
        write_text(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))


def open_run(stage: str, out: Path, recipe: Recipe, inputs: dict[str, str]) -> RunFolder:
    """Make the run folder, or go on in the one that is there.

    Args:
        stage: the stage that writes it.
        out: the folder.
        recipe: the settings; written to ``recipe.yaml``.
        inputs: fingerprints of what the result depends on besides the settings (data, model); one that
            differs from an earlier start is refused.

    Raises:
        RecipeError: the folder holds another stage's run, other settings, other inputs, or other files.
    """
    recipe_file, inputs_file = out / RECIPE, out / INPUTS
    if not recipe_file.is_file():
        if out.exists() and any(entry for entry in out.iterdir() if not _is_of_a_start(entry)):
            raise RecipeError(f"{out} exists and is not a tldist run; choose another out= or remove it.")
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        write_json(inputs_file, {"stage": stage, **inputs})
        recipe.write(recipe_file)
        return RunFolder(out, stage)
    before = read_json(inputs_file, RecipeError, "record of a run's inputs")
    if before.get("stage") != stage:
        raise RecipeError(f"{out} holds a run of '{before.get('stage')}'; choose another out= for '{stage}'.")
    old = type(recipe).make(**read_yaml(recipe_file))
    check_same_run(out, old, recipe)
    for name, value in inputs.items():
        if before.get(name) != value:
            raise RecipeError(
                f"{out} was made with other {name} (it has changed since, or another is given). "
                f"Choose another out=."
            )
    remove_leftovers(out)
    folder = RunFolder(out, stage, resumed=True)
    finished = folder.summary.get("status") == "done" and old == _with_free_fields(old, recipe)
    recipe.write(recipe_file)
    return RunFolder(out, stage, resumed=True, finished=finished)


def _is_of_a_start(entry: Path) -> bool:
    """Whether a file is what a start that was killed before its recipe was written leaves behind."""
    return entry.name.startswith(".tmp-") or entry.name == INPUTS


def _with_free_fields(old: Recipe, new: Recipe) -> Recipe:
    """``new``, with every free field as in ``old``: equal to ``old`` exactly when nothing was extended."""

    def kept(recipe_old: Recipe, recipe_new: Recipe) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, info in type(recipe_new).model_fields.items():
            before, now = getattr(recipe_old, name), getattr(recipe_new, name)
            if isinstance(before, Recipe) and isinstance(now, Recipe):
                values[name] = kept(before, now)
            else:
                values[name] = before if field_kind(info) is FREE else now
        return values

    return type(new).make(**kept(old, new))


@contextlib.contextmanager
def recorded(folder: RunFolder, enabled: bool) -> Iterator[None]:
    """Record in ``summary.json`` how the stage ended, where it did not end well.

    Args:
        folder: the run.
        enabled: only the main process writes.
    """
    try:
        yield
    except CheckFailed:
        raise
    except Preempted as stop:
        if enabled:
            folder.write_summary("preempted", reason=str(stop))
        raise
    except KeyboardInterrupt:
        if enabled:
            folder.write_summary("interrupted", reason="interrupted by the keyboard")
        raise
    except BaseException as error:
        if enabled:
            folder.write_summary("failed", reason=f"{type(error).__name__}: {error}")
        raise
