"""The command line: parse, import the one stage, run it, print the verdict."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tldist import __version__

if TYPE_CHECKING:
    from tldist.errors import TldistError
    from tldist.recipe import Recipe
    from tldist.runs import Outcome
    from tldist.stages import Stage

INTERRUPTED = 130
_LOST_CONTACT = (
    "connection closed by peer",
    "connection reset by peer",
    "timed out waiting",
    "nccl communicator was aborted",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (0, 1, 2, 75 or 130)."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    from tldist.errors import TldistError

    try:
        return _run(options)
    except TldistError as error:
        if options.debug:
            raise
        _print_error(f"error: {error}")
        if options.json:
            _print_failure(options.command, error)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has gone (tldist ... | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        if options.debug:
            raise
        _print_error("interrupted; run the same command again to go on")
        return INTERRUPTED
    except RuntimeError as error:
        if options.debug or not any(sign in str(error).lower() for sign in _LOST_CONTACT):
            raise
        _print_error(
            "error: lost contact with another process; its own message says why (--debug shows where)"
        )
        return 1
    finally:
        _leave_job(together=False)


def _leave_job(together: bool) -> None:
    """End the job of several processes, where the stage has joined one."""
    distributed = sys.modules.get("tldist.distributed")
    if distributed is not None:
        distributed.end(together=together)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tldist", add_help=False)
    parser.add_argument("command", nargs="?")
    parser.add_argument("arguments", nargs="*")
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="version", version=f"tldist {__version__}")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--debug", action="store_true")
    return parser.parse_intermixed_args(list(arguments))


def _run(options: argparse.Namespace) -> int:
    from tldist.stages import STAGES, find_stage, load_recipe_class

    if options.command is None:
        print(_overview(STAGES))
        return 0
    stage = find_stage(options.command)
    recipe_class = load_recipe_class(stage)
    if options.help:
        from tldist.settings_help import describe_settings

        print(f"tldist {options.command} {stage.usage}\n\n  {stage.sentence}\n\nsettings (key=value):")
        print(describe_settings(recipe_class))
        print(_FLAGS)
        return 0
    from tldist.recipe import read_recipe

    recipe = read_recipe(recipe_class, options.arguments)
    if options.dry_run:
        import yaml

        print(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True), end="")
        return 0
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and not stage.distributed:
        from tldist.errors import MachineError

        raise MachineError(
            f"`tldist {options.command}` runs in one process; a launcher started {processes}. "
            f"Run it without accelerate launch."
        )
    outcome = _import_work(stage)(recipe)
    _leave_job(together=True)
    _print_outcome(outcome, options.json)
    return 0 if outcome.passed else 1


def _import_work(stage: Stage) -> Callable[[Recipe], Outcome]:
    """Import the stage; a library that is missing names the extra that brings it."""
    from tldist.errors import MissingExtra
    from tldist.stages import load_work

    try:
        return load_work(stage)
    except ModuleNotFoundError as error:
        if stage.extra is None or (error.name or "").startswith("tldist"):
            raise
        raise MissingExtra(str(error.name), stage.extra) from error


def _print_outcome(outcome: Outcome, as_json: bool) -> None:
    from tldist.progress import say

    if outcome.text:
        say(outcome.text)
    if outcome.out:
        say(f"result: {outcome.out}")
    if outcome.next_command:
        say(f"next:   {outcome.next_command}")
    if as_json:
        say(outcome.to_json())


def _print_failure(command: str | None, error: TldistError) -> None:
    """The verdict of a stage that did not end well, as the last line."""
    from tldist.progress import say

    status = "preempted" if error.exit_code == 75 else "failed"
    say(json.dumps({"stage": command, "status": status, "error": str(error), "exit_code": error.exit_code}))


def _print_error(text: str) -> None:
    """In a job of several processes a line says whose it is."""
    rank = os.environ.get("RANK")
    where = (
        f"[rank {rank} on {platform.node()}] " if rank and os.environ.get("WORLD_SIZE", "1") != "1" else ""
    )
    print(f"{where}{text}", file=sys.stderr, flush=True)


_FLAGS = """
flags: --dry-run (print the resolved recipe and stop)  --json (last line: the verdict as JSON)
       --debug (tracebacks)
on several processes: accelerate launch --config_file launch/accelerate/FILE.yaml -m tldist ..."""


def _overview(stages: dict[str, Stage]) -> str:
    width = max(map(len, stages))
    lines = [f"  {name.ljust(width)}  {stage.sentence}" for name, stage in stages.items()]
    return (
        f"tldist {__version__}: transfer learning for vision, from a pre-trained model to production\n\n"
        "usage: tldist COMMAND [INPUT ...] [key=value ...] [--dry-run] [--json] [--debug]\n"
        "       tldist COMMAND --help\n\n" + "\n".join(lines) + "\n\nStart with: tldist demo"
    )
