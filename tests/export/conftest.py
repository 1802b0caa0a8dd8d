"""Fixtures of the export tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support_export import export_small_cnn, export_squeezenet


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle and its package, of SqueezeNet with logits and features. Not to be changed."""
    return export_squeezenet(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bundle (of code of one's own) and its package, of a small residual network. Not to be changed."""
    return export_small_cnn(tmp_path_factory.mktemp("small"))
