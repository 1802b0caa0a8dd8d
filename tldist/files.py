"""Files are written whole or not at all, and known by their hash."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tldist.errors import TldistError

_TEMPORARY = ".tmp-"
_WORTH_STARTING = 1 << 16
_ASIDE = re.compile(r"\.tmp-[0-9a-f]{12}-old-(.+)")


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:  # noqa: PTH123 - hashlib wants the file object
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of UTF-8 text."""
    return hashlib.sha256(text.encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces. For hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable (a rename is only safe once its folder is on disk)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def start_writing_back(handle: int, offset: int, size: int) -> None:
    """Let the system begin to bring written bytes to the disk, where it can (Linux): `sync` waits less then.

    Args:
        handle: of the file.
        offset, size: in bytes; of less than a page or two nothing is begun.
    """
    if sys.platform == "linux" and size >= _WORTH_STARTING:
        write = 2  # SYNC_FILE_RANGE_WRITE; an error here only means that sync has more to do
        ctypes.CDLL(None).sync_file_range(handle, ctypes.c_int64(offset), ctypes.c_int64(size), write)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is synced and renamed, on error removed."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-{target.name}"
    try:
        yield temporary
        # Some writers (safetensors) create files for the owner alone; a shared folder wants the umask.
        temporary.chmod(0o666 & ~_umask())
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it takes the place of ``path`` whole.

    An existing folder is moved aside first and removed last, so that no moment shows a mixture of both.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-{target.name}"
    temporary.mkdir()
    try:
        yield temporary
        mask = _umask()
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(0o666 & ~mask)
                sync(file)
        sync(temporary)
        aside = target.parent / f"{_TEMPORARY}{uuid.uuid4().hex[:12]}-old-{target.name}"
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
        sync(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def remove_leftovers(folder: str | os.PathLike[str]) -> None:
    """Remove what a killed process left half-written directly in ``folder``.

    A folder that was moved aside, and whose successor did not come to its place, is moved back.
    """
    for leftover in Path(folder).glob(f"{_TEMPORARY}*"):
        aside = _ASIDE.fullmatch(leftover.name)
        if aside and not (Path(folder) / aside[1]).exists():
            leftover.rename(Path(folder) / aside[1])
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text whole or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write indented JSON whole or not at all (NaN is refused: it is not JSON)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str], error: type[TldistError], what: str) -> Any:
    """Read JSON; a missing or malformed file raises ``error`` that names it.

    Args:
        path: the file.
        error: the class to raise.
        what: what the file is, for the message ("bundle configuration").
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: no such file (expected a {what}).") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as problem:
        raise error(f"{path}: cannot be read as a {what}: {problem}.") from problem
