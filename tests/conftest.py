"""Fixtures that all tests share."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Caches of the tests' own, away from those of the person who runs them.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tldist-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real photos, digits and pre-trained weights; skips where it is not there."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TLDIST_REAL_DATA", default))
    if not (folder / "photos").is_dir():
        pytest.skip(f"no real data at {folder} (set TLDIST_REAL_DATA)")
    return folder
