"""Who does which unit: processes that share a folder take units by locks, and need not know one another."""

from __future__ import annotations

import errno
import fcntl
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tldist.embed.layout import LOCK
from tldist.errors import MachineError

_SETUP, _FIRST_UNIT = 0, 1


class Claims:
    """Locks on single bytes of one file: byte 0 for the folder's own files, byte k + 1 for unit k.

    The system frees them when a process dies, however it dies, so a claim never outlives its owner. They
    hold between processes, not between threads of one; the file is opened once, since closing any handle of
    it would free them all.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)

    def close(self) -> None:
        """Give all claims back."""
        os.close(self._handle)

    def take(self, unit: int) -> bool:
        """Claim a unit; False where another process holds it."""
        return self._lock(_FIRST_UNIT + unit, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def give_back(self, unit: int) -> None:
        """Give a unit back."""
        self._lock(_FIRST_UNIT + unit, fcntl.LOCK_UN)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait for, and hold, the right to write the files that belong to no unit."""
        self._lock(_SETUP, fcntl.LOCK_EX)
        try:
            yield
        finally:
            self._lock(_SETUP, fcntl.LOCK_UN)

    def _lock(self, byte: int, operation: int) -> bool:
        try:
            fcntl.lockf(self._handle, operation, 1, byte)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise MachineError(
                f"{self.path}: this file system has no file locks ({error.strerror}), by which processes "
                f"share the work. Choose an out= on another one, and copy the folder when it is finished."
            ) from error
        return True


def take_units(
    missing: Sequence[int], is_done: Callable[[int], bool], claims: Claims, elsewhere: Callable[[int], None]
) -> Iterator[int | None]:
    """Units for this process to do, each claimed; it ends when all of ``missing`` are done, by whomever.

    A slow process holds nobody up, and the units of one that died are taken over.

    Args:
        missing: units that had no commit marker at the start, in order.
        is_done: whether a unit has its commit marker now.
        claims: the locks; a unit is given back by the caller, after its commit.
        elsewhere: called with each unit that another process has done.

    Yields:
        A unit, or None where all that is left is in other hands: finish what you hold, wait a little, and
        ask again.
    """
    while missing:
        waiting: deque[int] = deque()
        for unit in missing:
            if is_done(unit):
                elsewhere(unit)
            elif not claims.take(unit):
                waiting.append(unit)
            elif is_done(unit):  # committed between the look and the claim
                claims.give_back(unit)
                elsewhere(unit)
            else:
                yield unit
            while waiting and is_done(waiting[0]):
                elsewhere(waiting.popleft())
        missing = list(waiting)
        if missing:
            yield None
