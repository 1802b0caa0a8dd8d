"""Where mergekit is right, the result is mergekit's to 1e-6 (recorded by record_mergekit.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tldist.fuse.weights import sparse
from tldist.fuse.weights.linear import Array
from tldist.fuse.weights.method import Piece, Settings
from tldist.fuse.weights.methods import METHODS

RECORD = Path(__file__).with_name("mergekit.safetensors")
NAMES = ("conv.weight", "fc.weight", "fc.bias")


@pytest.fixture(scope="module")
def record() -> dict[str, Array]:
    return load_file(RECORD)


def settings() -> Settings:
    with safe_open(RECORD, "numpy") as file:
        values = json.loads(file.metadata()["settings"])
    weights = tuple(values.pop("weights"))
    return Settings(weights, **values)


def piece_of(record: dict[str, Array], name: str, models: int = 3) -> Piece:
    base = record[f"input/base/{name}"]
    return Piece(name, [record[f"input/m{n}/{name}"] for n in range(models)], base)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "method", ["average", "slerp", "task_arithmetic", "ties", "breadcrumbs", "model_stock"]
)
def test_methods__equal_mergekit(record: dict[str, Array], method: str, name: str) -> None:
    told = settings()
    if method == "model_stock":  # mergekit's averages without weights
        told = Settings((1.0, 1.0, 1.0))
    if method == "slerp":
        told = Settings((1.0, 1.0), alpha=told.alpha)
    piece = piece_of(record, name, models=2 if method == "slerp" else 3)
    found = METHODS[method].apply(piece, told)
    np.testing.assert_allclose(found, record[f"{method}/{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare__equals_mergekit_with_the_same_masks(
    record: dict[str, Array], method: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(key: tuple[int, str, int], start: int, shape: tuple[int, ...], density: float) -> Array:
        assert (key[1], start, density) == (name, 0, 0.3)
        return record[f"mask/{name}.{key[2]}"].reshape(shape).astype(bool)

    monkeypatch.setattr("tldist.fuse.weights.methods.random_mask", recorded)
    found = METHODS[method].apply(piece_of(record, name), settings())
    np.testing.assert_allclose(found, record[f"{method}/{name}"], rtol=1e-6, atol=1e-6)
    assert sparse.random_mask is not recorded


@pytest.mark.parametrize("name", NAMES)
def test_multi_slerp__is_the_karcher_mean(record: dict[str, Array], name: str) -> None:
    """mergekit's takes no weights."""
    piece = piece_of(record, name)
    found = METHODS["multi_slerp"].apply(Piece(name, piece.models), Settings((1.0, 1.0, 1.0)))
    np.testing.assert_allclose(found, record[f"karcher/{name}"], rtol=2e-6, atol=2e-6)
