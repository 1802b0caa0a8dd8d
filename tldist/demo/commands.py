"""Steps of the story: the command as a person would type it, printed, then run."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tldist import cli
from tldist.domain.recipe import DataRecipe
from tldist.errors import CheckFailed, Preempted, TldistError
from tldist.progress import say
from tldist.share import find_shared


def as_words(settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings as typed: ``{"data": {"path": "D"}, "optimizer": {"lr": 0.1}}`` to data=D optimizer.lr=0.1."""
    words: list[str] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            words += as_words(value, f"{prefix}{name}.")
        elif prefix and name == DataRecipe.shorthand:
            words.append(f"{prefix[:-1]}={_as_text(value)}")
        else:
            words.append(f"{prefix}{name}={_as_text(value)}")
    return words


def _as_text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(_as_text(part) for part in value)
    return "none" if value is None else str(value)


def heading(text: str) -> None:
    """What the next step is for."""
    say(f"\n# {text}")


def command(stage: str, *inputs: str | Path, **settings: Any) -> None:
    """Run a command in this process (a process of its own costs seconds to start).

    Raises:
        TldistError: it failed; it has said why.
    """
    words = [stage, *map(str, inputs), *as_words(settings)]
    say(f"$ tldist {shlex.join(words)}")
    _check(cli.main(words), stage)


def launched(stage: str, **settings: Any) -> None:
    """Run a command on the processes that suit this machine, by ``accelerate launch``.

    Raises:
        TldistError: it failed; its processes have said why.
    """
    words = ["-m", "tldist", stage, *as_words(settings)]
    # Two processes would have to share a single GPU.
    name = "gpu-1.yaml" if torch.cuda.device_count() == 1 else "cpu-2.yaml"
    file = _short(find_shared("launch") / "accelerate" / name)
    say(f"$ accelerate launch --config_file {shlex.quote(str(file))} {shlex.join(words)}")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    answer = subprocess.run([*launcher, *words], env={"OMP_NUM_THREADS": threads, **os.environ}, check=False)
    _check(answer.returncode, stage)


@contextlib.contextmanager
def into_log(file: Path) -> Iterator[None]:
    """Send what stages print to a file: twelve plans and progress bars tell nobody anything."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        file.open("a", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def _short(path: Path) -> Path:
    """Relative to here, where it lies below."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _check(code: int, stage: str) -> None:
    if code == 0:
        return
    message = f"the demo stops: the step '{stage}' ended with exit code {code} (its own message is above)."
    if code == cli.INTERRUPTED:
        raise KeyboardInterrupt
    raise {CheckFailed.exit_code: CheckFailed, Preempted.exit_code: Preempted}.get(code, TldistError)(message)
