"""What this process may use of its machine: the cores, and memory that was freed before."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MAP_ABOVE = (1 << 30, 32 << 20)
"""Bytes from which memory is mapped by itself: as asked for, and the most that older libraries take."""


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, where the C library can (glibc).

    By default each large array is mapped, filled with zeros page by page and unmapped again, every time: a
    third of the time of training on a CPU, and half of that of merging files.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for threshold in _MAP_ABOVE:
            if mallopt(_M_MMAP_THRESHOLD, threshold):
                break
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
