"""Fixtures of the serving tests: one package, and two servers that many tests ask."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support_serve import Server, write_colour_package


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of fixed size. Not to be changed."""
    return write_colour_package(tmp_path_factory.mktemp("serve") / "package")


def running(package: Path, *settings: str) -> Iterator[Server]:
    server = Server(package, *settings)
    yield server
    code, _, errors = server.stop()
    assert code == 0, errors
    assert "Traceback" not in errors


@pytest.fixture(scope="session")
def server(package: Path) -> Iterator[Server]:
    """Generous limits."""
    yield from running(package, "max_delay_ms=20", "max_batch=8", "max_body_mb=1")


@pytest.fixture(scope="session")
def strict(package: Path) -> Iterator[Server]:
    """Tight limits: four images at a time, 0.7 seconds a request."""
    yield from running(package, "queue=4", "max_images=3", "timeout_s=0.7", "max_pixels=10000")
