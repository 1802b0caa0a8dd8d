"""Where a training's numbers go: ``metrics.jsonl`` always, and the trackers that Accelerate knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from tldist.distributed import Team
from tldist.errors import RecipeError, close_matches
from tldist.progress import warn
from tldist.runs import RunFolder

PROJECT = "tldist"


class Journal:
    """Takes the numbers of a run, on the main process.

    Trackers start with the first line; TensorBoard then withdraws what it has of later steps, from a start
    that was killed after it had saved.

    Args:
        folder: the run; TensorBoard's files lie in ``RUN/tensorboard``.
        names: of trackers.
        settings: of the run, for trackers that keep them.
        team: the processes.

    Raises:
        RecipeError: a tracker is unknown, or not installed.
    """

    def __init__(self, folder: RunFolder, names: Sequence[str], settings: dict[str, Any], team: Team) -> None:
        self.folder, self.settings, self.speaks = folder, settings, team.is_main
        self.names = [name for name in dict.fromkeys(names) if _is_there(name)]
        self._trackers: list[GeneralTracker] | None = None

    def log(self, step: int, **values: float) -> None:
        """One line."""
        if not self.speaks:
            return
        self.folder.log(step=step, **values)
        if self._trackers is None:
            self._trackers = [_start(name, self.folder.path, self.settings, step) for name in self.names]
        for tracker in self._trackers:
            tracker.log(values, step=step)

    def close(self) -> None:
        """Write what trackers still hold."""
        for tracker in self._trackers or []:
            tracker.finish()


def _is_there(name: str) -> bool:
    if name not in LOGGER_TYPE_TO_CLASS:
        raise RecipeError(f"track={name}: unknown. {close_matches(name, LOGGER_TYPE_TO_CLASS)}")
    if name in [str(tracker) for tracker in get_available_trackers()]:
        return True
    if name != "tensorboard":
        raise RecipeError(f"track={name}: it is not installed. Install it with: pip install {name}")
    warn("tensorboard is not installed: the numbers go to metrics.jsonl alone")
    return False


def _start(name: str, folder: Path, settings: dict[str, Any], step: int) -> GeneralTracker:
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name == "tensorboard":
        tracker = kind(name, str(folder), purge_step=step)
        tracker.start()
        return tracker
    tracker = kind(PROJECT, str(folder)) if kind.requires_logging_directory else kind(PROJECT)
    tracker.start()
    tracker.store_init_configuration(settings)
    return tracker
