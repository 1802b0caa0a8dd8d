"""Fixtures of the bench tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support_export import export_squeezenet


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle and its package, of SqueezeNet with logits and features. Not to be changed."""
    return export_squeezenet(tmp_path_factory.mktemp("bench"))
