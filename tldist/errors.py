"""The errors that a person can mend: what was found, what was expected, what to do.

TldistError                 exit code 2: the input is wrong
├── RecipeError             a setting: unknown key, wrong value, a change that the run refuses
├── DomainError             a data set: missing folder, empty class, too many broken images
├── BundleError             a model folder or a weights file: not a bundle, truncated, wrong hash
├── ModelError              an architecture: unknown name, weights that do not fit
├── PackageError            an exported model: not a package, wrong hash, a graph that does not load
├── MachineError            this machine or this job: provider, precision, number of processes
├── MissingExtra            a library that is not installed, with the pip line that mends it
├── Diverged                exit code 1: a loss is not a finite number
├── CheckFailed             exit code 1: a check was made and it failed (parity, verify)
└── Preempted               exit code 75: told to stop, has saved; run the same command again
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class TldistError(Exception):
    """Base of all errors that are a person's to mend; the message is all that the command line prints."""

    exit_code = 2


class RecipeError(TldistError):
    """A setting is unknown, malformed, or not allowed to change for this run."""


class DomainError(TldistError):
    """A data set is missing, empty, inconsistent or too broken."""


class BundleError(TldistError):
    """A model folder or weights file cannot be trusted or is not what it was taken for."""


class ModelError(TldistError):
    """A model name is unknown, or weights do not fit the architecture."""


class PackageError(TldistError):
    """An exported package cannot be trusted, loaded or run."""


class MachineError(TldistError):
    """What was asked for does not exist on this machine or in this job."""


class MissingExtra(TldistError):
    """A library is not installed.

    Args:
        library: the import name that failed.
        extra: the extra of tldist that brings it.
    """

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed. Install it with: pip install 'tldist[{extra}]'")
        self.library, self.extra = library, extra


@contextlib.contextmanager
def needs(extra: str) -> Iterator[None]:
    """Inside, the import of a library that is not installed raises `MissingExtra`, naming the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "tldist").startswith("tldist"):
            raise
        raise MissingExtra(str(error.name), extra) from error


class Diverged(TldistError):
    """The loss of a training step is not a finite number."""

    exit_code = 1


class CheckFailed(TldistError):
    """A check was made and it failed."""

    exit_code = 1


class Preempted(TldistError):
    """The job was told to stop and has saved its state."""

    exit_code = 75


def close_matches(name: str, known: Iterable[str], most: int = 3) -> str:
    """``Did you mean: a, b?`` for a wrong name, or the known names where nothing is close."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=most, cutoff=0.5)
    close = close or [n for n in names if name and (name.lower() in n.lower())][:most]
    if close:
        return f"Did you mean: {', '.join(close)}?"
    shown = ", ".join(names[:30])
    return f"Known: {shown}{', ...' if len(names) > 30 else ''}."
