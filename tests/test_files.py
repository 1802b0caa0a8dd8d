"""Files and folders are written whole or not at all, a kill at any moment included."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tldist.errors import BundleError
from tldist.files import (
    atomic_file,
    atomic_folder,
    canonical_json,
    read_json,
    remove_leftovers,
    sha256_file,
    sha256_text,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    """What lies in a folder."""
    return sorted(entry.name for entry in folder.iterdir())


def write_half(path: Path) -> None:
    """Write something, then fail."""
    path.write_text("half")
    raise OSError("disk full")


def test_atomic_file__replaces_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.txt"
    write_text(target, "one")
    write_text(target, "two")
    assert target.read_text() == "two"
    assert names(target.parent) == ["file.txt"]


def test_atomic_file__an_error_keeps_the_old_content(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    write_text(target, "old")
    with pytest.raises(OSError, match="disk"):  # noqa: SIM117 - PT012 wants one statement
        with atomic_file(target) as temporary:
            write_half(temporary)
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_atomic_file__others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "f") as temporary:
            temporary.touch(mode=0o600)
        with atomic_folder(tmp_path / "d") as folder:
            (folder / "g").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "d" / "g").stat().st_mode & 0o777 == 0o640


def test_atomic_folder__replaces_a_folder_whole(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    for number in (1, 2):
        with atomic_folder(target) as folder:
            (folder / f"only-{number}").write_text("x")
    assert names(target) == ["only-2"]
    assert names(tmp_path) == ["bundle"]


def test_atomic_folder__an_error_keeps_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("x")
    with pytest.raises(OSError, match="disk"):  # noqa: SIM117
        with atomic_folder(target) as folder:
            write_half(folder / "half")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["bundle"]


WRITER = """
import sys
from pathlib import Path
from tldist.files import atomic_folder, atomic_file
target = Path(sys.argv[1])
for generation in range(1_000_000):
    with atomic_folder(target / "folder") as folder:
        for part in range(8):
            (folder / f"{part}.txt").write_text(f"{generation} " * 2000)
    with atomic_file(target / "file.txt") as file:
        file.write_text(f"{generation} " * 20000)
"""


@pytest.mark.parametrize("delay", [0.011, 0.023, 0.047, 0.089, 0.131])
def test_kill__leaves_whole_generations_only(tmp_path: Path, delay: float) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], cwd=REPOSITORY)
    try:
        limit = time.monotonic() + 30
        while not (tmp_path / "file.txt").exists():
            assert time.monotonic() < limit, "the writer never came to write"
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert len(set((tmp_path / "file.txt").read_text().split())) == 1
    assert len((tmp_path / "file.txt").read_text().split()) == 20000
    # An old folder is moved aside just before the new one takes its place: at that moment there is none.
    if (tmp_path / "folder").exists():
        texts = [path.read_text().split() for path in sorted((tmp_path / "folder").iterdir())]
        assert [len(text) for text in texts] == [2000] * 8
        assert len({word for text in texts for word in text}) == 1
    remove_leftovers(tmp_path)
    assert set(names(tmp_path)) <= {"file.txt", "folder"}


def test_hash__equals_hashlib(tmp_path: Path) -> None:
    data = os.urandom(3_000_001)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()
    assert sha256_text("é") == hashlib.sha256("é".encode()).hexdigest()


def test_canonical_json__is_one_text_for_equal_values() -> None:
    assert (
        canonical_json({"b": [1, 2], "a": "é"})
        == canonical_json({"a": "é", "b": [1, 2]})
        == '{"a":"é","b":[1,2]}'
    )


def test_json__nan_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "f.json", {"loss": float("nan")})
    assert names(tmp_path) == []


def test_json__missing_or_malformed_names_file_and_expectation(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"f\.json: no such file \(expected a thing\)"):
        read_json(tmp_path / "f.json", BundleError, "thing")
    (tmp_path / "f.json").write_text('{"half": ')
    with pytest.raises(BundleError, match=r"f\.json: cannot be read as a thing"):
        read_json(tmp_path / "f.json", BundleError, "thing")
    write_json(tmp_path / "f.json", {"a": [1]})
    assert read_json(tmp_path / "f.json", BundleError, "thing") == json.loads('{"a": [1]}')


def test_atomic_folder__killed_between_its_two_renames_keeps_the_old_one(tmp_path: Path) -> None:
    """The state that such a kill leaves: the old folder aside, the new one not yet in its place."""
    for name, text in ((".tmp-0123456789ab-old-bundle", "old"), (".tmp-ba9876543210-bundle", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (tmp_path / "bundle" / "config.json").read_text() == "old"
