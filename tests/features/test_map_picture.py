"""The map of two domains: coordinates against scikit-learn, the picture's parts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from tldist.errors import DomainError, RecipeError
from tldist.features.map_picture import draw_domains, project


def domains(n: int, m: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(n)
    mixing = random.normal(size=(width, width))
    return random.normal(size=(n, width)) @ mixing, random.normal(size=(m, width)) @ mixing + 1


@pytest.mark.parametrize(("n", "m", "width"), [(40, 30, 6), (4, 3, 20), (10, 10, 2)])
def test_project__is_scikit_learns_pca_of_both(n: int, m: int, width: int) -> None:
    x, y = domains(n, m, width)
    reference = PCA(2, svd_solver="full").fit(np.concatenate([x, y]))
    found = project(x, y)
    points = np.concatenate([found.source, found.target])
    np.testing.assert_allclose(np.abs(points), np.abs(reference.transform(np.concatenate([x, y]))), atol=1e-9)
    assert found.share == pytest.approx(reference.explained_variance_ratio_.sum())
    again = project(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_array_equal(found.source, again.source)


def test_project__of_one_dimension_and_of_many_rows() -> None:
    flat = project(np.arange(6.0)[:, None], np.arange(4.0)[:, None])
    assert flat.target.shape == (4, 2)
    assert flat.share == pytest.approx(1)
    x, y = domains(300, 20, 3)
    few = project(x, y, most=50)
    assert len(few.source) == len(few.source_rows) == 50
    assert len(few.target) == 20
    assert project(np.ones((3, 2)), np.ones((3, 2))).share == 1.0


def test_project__tsne_keeps_neighbours_and_is_repeatable() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(40) % 2
    x, y = (random.normal(size=(40, 8)) + 12 * labels[:, None] for _ in range(2))
    found = project(x, y, method="tsne")
    points, both = np.concatenate([found.source, found.target]), np.tile(labels, 2)
    nearest = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(80) * 1e9
    assert (both[nearest.argmin(1)] == both).mean() > 0.95
    assert found.share is None
    np.testing.assert_array_equal(found.source, project(x, y, method="tsne").source)


def test_project__refuses() -> None:
    x, y = domains(10, 10, 3)
    with pytest.raises(DomainError, match="3 dimensions, the target's 2"):
        project(x, y[:, :2])
    with pytest.raises(RecipeError, match="Did you mean: tsne"):
        project(x, y, method="tsn")


def test_draw_domains__colour_is_the_class_and_marker_the_domain() -> None:
    x, y = domains(30, 20, 4)
    projected = project(x, y, most=15)
    picture = draw_domains(projected, ["cat", "dog"] * 15, ["dog", "emu"] * 10, ("photo", "sketch"))
    words = re.findall(r">([^<>]+)</text>", picture)
    assert {"cat", "dog", "emu", "photo", "sketch"} <= set(words)
    blank = re.findall(r">([^<>]+)</text>", draw_domains(projected, ["cat", "dog"] * 15))
    assert {"cat", "dog", "target", "source"} <= set(blank)
    assert picture == draw_domains(projected, ["cat", "dog"] * 15, ["dog", "emu"] * 10, ("photo", "sketch"))
