"""Where the files that people copy and edit lie: ``launch/`` and ``export/``, in repository or wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def find_shared(name: str) -> Path:
    """The path of a shipped file or folder, ``launch/accelerate/cpu-2.yaml`` for instance.

    Raises:
        FileNotFoundError: it is shipped under no such name.
    """
    for root in (_PACKAGE / "_share", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{name} is not among the files that tldist ships")
