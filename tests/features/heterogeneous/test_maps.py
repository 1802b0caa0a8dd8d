"""Maps between two models' features against scikit-learn and SciPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge

from tldist.errors import DomainError, RecipeError
from tldist.features.cross_moments import CrossMoments
from tldist.features.heterogeneous.anchors import class_means, pair_anchors
from tldist.features.heterogeneous.cca import fit_cca
from tldist.features.heterogeneous.maps import Into
from tldist.features.heterogeneous.methods import CCA_POWER, CCA_RIDGE, METHODS, fit_pairs
from tldist.features.heterogeneous.procrustes import fit_procrustes
from tldist.features.heterogeneous.ridge import GRID, fit_ridge, gcv_errors


def paired(n: int, source: int, target: int, seed: int, noise: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Two views of three hidden causes, off their origins."""
    random = np.random.default_rng(seed)
    hidden = random.normal(size=(n, 3))
    x = hidden @ random.normal(size=(3, source)) + noise * random.normal(size=(n, source)) + 5
    y = hidden @ random.normal(size=(3, target)) + noise * random.normal(size=(n, target)) - 2
    return x, y


def of(x: np.ndarray, y: np.ndarray) -> CrossMoments:
    return CrossMoments.from_batch(x, y)


SHAPES = [(60, 5, 5), (60, 4, 9), (60, 9, 4), (8, 12, 6), (8, 6, 12)]

# -- ridge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "source", "target"), SHAPES)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
def test_ridge__is_scikit_learns(n: int, source: int, target: int, ridge: float) -> None:
    x, y = paired(n, source, target, seed=n)
    maps = fit_ridge(of(x, y), ridge, into="target")
    penalty = ridge * n * x.var(0).mean()
    reference = Ridge(alpha=penalty, solver="svd").fit(x, y)
    np.testing.assert_allclose(maps.map_source(x), reference.predict(x), atol=1e-9)
    assert maps.source is not None
    np.testing.assert_allclose(maps.source.weight.numpy(), reference.coef_, atol=1e-9)
    assert maps.target is None
    residual = ((y - reference.predict(x)) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert maps.details["explained"] == pytest.approx(1 - residual, abs=1e-9)


@pytest.mark.parametrize(("n", "source", "target"), SHAPES)
def test_ridge__gcv_is_that_of_the_hat_matrix(n: int, source: int, target: int) -> None:
    x, y = paired(n, source, target, seed=n + 1)
    ridges = (1e-3, 0.1, 10.0)
    centred, answers = x - x.mean(0), y - y.mean(0)
    for ridge, found in zip(ridges, gcv_errors(of(x, y), ridges)):
        inverse = np.linalg.inv(centred.T @ centred + ridge * n * x.var(0).mean() * np.eye(source))
        hat = centred @ inverse @ centred.T + 1 / n
        residual = answers - (hat - 1 / n) @ answers
        expected = (residual**2).sum() / n / (1 - np.trace(hat) / n) ** 2
        assert found == pytest.approx(expected, rel=1e-8)


def test_ridge__chosen_by_gcv_is_near_the_best_on_new_pairs() -> None:
    x, y = paired(400, 30, 8, seed=5, noise=2.0)
    maps = fit_ridge(of(x[:40], y[:40]), into="target")
    assert maps.details["ridge"] in GRID
    assert len(maps.details["gcv"]) == len(GRID)

    def error(ridge: float) -> float:
        return float(
            ((fit_ridge(of(x[:40], y[:40]), ridge, into="target").map_source(x[40:]) - y[40:]) ** 2).mean()
        )

    errors = {ridge: error(ridge) for ridge in GRID}
    assert error(maps.details["ridge"]) < 1.1 * min(errors.values())
    assert max(errors[GRID[0]], errors[GRID[-1]]) > 1.3 * min(errors.values())


def test_ridge__without_penalty_and_with_directions_without_variance() -> None:
    x, y = paired(30, 3, 4, seed=6)
    wide = np.concatenate([x, x[:, :1] * 2, np.full((30, 1), 0.1)], axis=1)
    reference = np.linalg.lstsq(np.c_[x, np.ones(30)], y, rcond=None)[0]
    for inputs in (x, wide):
        np.testing.assert_allclose(
            fit_ridge(of(inputs, y), 0.0, into="target").map_source(inputs),
            np.c_[x, np.ones(30)] @ reference,
            atol=1e-8,
        )
    assert np.isfinite(fit_ridge(of(wide, y), into="target").map_source(wide)).all()


def test_ridge__source_that_does_not_vary_gives_the_targets_mean() -> None:
    _, y = paired(10, 2, 3, seed=1)
    maps = fit_ridge(of(np.ones((10, 2)), y), into="target")
    np.testing.assert_allclose(maps.map_source(np.zeros((2, 2))), np.tile(y.mean(0), (2, 1)), atol=1e-12)


# -- Procrustes ----------------------------------------------------------------------------------------------


def test_procrustes__is_scipys_where_widths_agree() -> None:
    x, y = paired(60, 5, 5, seed=2)
    rotation, agreement = scipy.linalg.orthogonal_procrustes(x - x.mean(0), y - y.mean(0))
    plain = fit_procrustes(of(x, y), scaling=False, into="target")
    assert plain.source is not None
    np.testing.assert_allclose(plain.source.weight.numpy(), rotation.T, atol=1e-9)
    np.testing.assert_allclose(plain.map_source(x).mean(0), y.mean(0), atol=1e-9)
    scaled = fit_procrustes(of(x, y), into="target")
    assert scaled.source is not None
    scale = agreement / ((x - x.mean(0)) ** 2).sum()
    assert scaled.details["scale"] == pytest.approx(scale)
    np.testing.assert_allclose(scaled.source.weight.numpy(), scale * rotation.T, atol=1e-9)


@pytest.mark.parametrize(("source", "target"), [(4, 7), (7, 4)])
def test_procrustes__of_other_widths_is_semi_orthogonal_and_best(source: int, target: int) -> None:
    x, y = paired(50, source, target, seed=3)
    a, b = x - x.mean(0), y - y.mean(0)
    maps = fit_procrustes(of(x, y), scaling=False, into="target")
    assert maps.source is not None
    found = maps.source.weight.numpy().T
    gram = found @ found.T if source < target else found.T @ found
    np.testing.assert_allclose(gram, np.eye(min(source, target)), atol=1e-10)
    # padding the narrower side with zeros makes it the square problem
    pad = [np.pad(side, ((0, 0), (0, max(source, target) - side.shape[1]))) for side in (a, b)]
    square = scipy.linalg.orthogonal_procrustes(*pad)[0][:source, :target]
    assert np.trace(found.T @ a.T @ b) == pytest.approx(np.trace(square.T @ a.T @ b))
    for seed in range(20):
        other = np.linalg.qr(np.random.default_rng(seed).normal(size=(7, 7)))[0][:source, :target]
        if source < target:
            assert ((a @ found - b) ** 2).sum() < ((a @ other - b) ** 2).sum()
        assert np.trace(found.T @ a.T @ b) > np.trace(other.T @ a.T @ b)
    scaled = fit_procrustes(of(x, y), into="target")
    errors = [((s * a @ found - b) ** 2).sum() for s in scaled.details["scale"] * np.array([0.99, 1, 1.01])]
    assert errors[1] == min(errors)
    total = (b**2).sum()
    assert scaled.details["explained"] == pytest.approx(1 - errors[1] / total)


def test_procrustes__recovers_a_rotation_from_few_pairs_within_their_span() -> None:
    random = np.random.default_rng(4)
    rotation = np.linalg.qr(random.normal(size=(10, 10)))[0]
    x = random.normal(size=(5, 10))
    maps = fit_procrustes(of(x, 3 * x @ rotation + 1), into="target")
    np.testing.assert_allclose(maps.map_source(x), 3 * x @ rotation + 1, atol=1e-8)
    assert maps.details["directions"] == 4
    assert maps.details["scale"] == pytest.approx(3)
    beyond = scipy.linalg.null_space(x - x.mean(0)).T
    np.testing.assert_allclose(
        maps.map_source(x.mean(0) + beyond), np.tile((3 * x @ rotation + 1).mean(0), (6, 1))
    )


# -- CCA -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "source", "target"), SHAPES[:3])
def test_cca__correlations_are_the_cosines_of_principal_angles(n: int, source: int, target: int) -> None:
    x, y = paired(n, source, target, seed=n + source)
    maps = fit_cca(of(x, y))
    angles = scipy.linalg.subspace_angles(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(maps.details["correlations"], np.sort(np.cos(angles))[::-1], atol=1e-8)
    u, v = maps.map_source(x), maps.map_target(y)
    width = min(source, target)
    joint = np.cov(np.c_[u, v], rowvar=False)
    np.testing.assert_allclose(joint[:width, :width], np.eye(width), atol=1e-8)
    np.testing.assert_allclose(joint[width:, width:], np.eye(width), atol=1e-8)
    np.testing.assert_allclose(joint[:width, width:], np.diag(maps.details["correlations"]), atol=1e-8)


def test_cca__directions_are_scikit_learns() -> None:
    x, y = paired(80, 5, 4, seed=8, noise=1.0)
    reference = CCA(4, scale=False, tol=1e-14, max_iter=100_000).fit(x, y)
    u, v = reference.transform(x, y)
    maps = fit_cca(of(x, y))
    found = [np.corrcoef(u[:, k], v[:, k])[0, 1] for k in range(4)]
    np.testing.assert_allclose(maps.details["correlations"], found, atol=1e-6)
    for k in range(4):
        for ours, theirs in ((maps.map_source(x), u), (maps.map_target(y), v)):
            assert abs(np.corrcoef(ours[:, k], theirs[:, k])[0, 1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("ridge", [0.01, 1.0])
def test_cca__regularised_solves_the_generalised_eigenproblem(ridge: float) -> None:
    x, y = paired(20, 6, 9, seed=11)
    a, b, c = np.cov(x.T), np.cov(y.T), np.cov(np.c_[x, y].T)[:6, 6:]
    a, b = (m + ridge * np.diag(m).mean() * np.eye(len(m)) for m in (a, b))
    zeros = np.zeros_like
    values = scipy.linalg.eigh(
        np.block([[zeros(a), c], [c.T, zeros(b)]]),
        np.block([[a, zeros(c)], [zeros(c).T, b]]),
        eigvals_only=True,
    )
    maps = fit_cca(of(x, y), ridge=ridge)
    np.testing.assert_allclose(maps.details["correlations"], values[::-1][:6], atol=1e-9)
    assert maps.source is not None
    assert maps.target is not None
    first = maps.source.weight.numpy()
    np.testing.assert_allclose(first @ a @ first.T, np.eye(6), atol=1e-9)


def test_cca__signs_and_dimensions_and_power() -> None:
    x, y = paired(60, 5, 4, seed=2)
    whole, part = fit_cca(of(x, y)), fit_cca(of(x, y), dimensions=2)
    assert whole.source is not None
    assert part.source is not None
    weight = whole.source.weight
    assert bool((weight.gather(1, weight.abs().argmax(1, keepdim=True)) > 0).all())
    np.testing.assert_allclose(part.source.weight.numpy(), weight[:2].numpy(), atol=1e-12)
    assert part.map_target(y).shape == (60, 2)
    weighted = fit_cca(of(x, y), power=2)
    squares = np.square(whole.details["correlations"])
    np.testing.assert_allclose(weighted.map_source(x), whole.map_source(x) * squares)
    np.testing.assert_allclose(weighted.map_target(y), whole.map_target(y) * squares)
    with pytest.raises(RecipeError, match="dimensions=5: the pairs span 4"):
        fit_cca(of(x, y), dimensions=5)


def test_cca__rank_deficient_sides_and_few_pairs() -> None:
    x, y = paired(30, 3, 4, seed=6)
    wide = np.concatenate([x, x @ np.ones((3, 2)), np.full((30, 1), 0.1)], axis=1)
    np.testing.assert_allclose(
        fit_cca(of(wide, y)).details["correlations"], fit_cca(of(x, y)).details["correlations"], atol=1e-8
    )
    x, y = paired(5, 9, 7, seed=6)
    np.testing.assert_allclose(fit_cca(of(x, y)).details["correlations"], np.ones(4), atol=1e-8)
    assert fit_cca(of(x, y), ridge=1.0).details["correlations"][-1] < 0.9
    with pytest.raises(RecipeError, match="do not vary"):
        fit_cca(of(np.ones((5, 2)), y))


# -- class means ---------------------------------------------------------------------------------------------


def test_anchors__pair_target_samples_with_the_means_of_their_classes() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 5)), random.normal(size=(30, 3))
    source, target = np.arange(40) % 4, np.arange(30) % 3 + 2  # class 4 is not in the source
    found = pair_anchors(x, source, y, target)
    shared = target < 4
    means = np.stack([x[source == c].mean(0) for c in target[shared]])
    expected = of(means, y[shared])
    assert found.count == 20
    torch.testing.assert_close(found.joint.scatter, expected.joint.scatter)
    assert list(class_means(x, source)) == [0, 1, 2, 3]
    with pytest.raises(DomainError, match="1 classes have images in both domains"):
        pair_anchors(x, source, y, np.full(30, 3))
    with pytest.raises(DomainError, match="target's labels: 1 rows have no label"):
        pair_anchors(x, source, y, np.array([-1, *target[1:]]))


def test_anchors__bring_the_classes_of_two_models_together() -> None:
    random = np.random.default_rng(1)
    centres = random.normal(size=(4, 6)) * 3
    labels = np.arange(200) % 4
    x = centres[labels] + random.normal(size=(200, 6))
    turn = np.linalg.qr(random.normal(size=(9, 9)))[0][:6]
    noise = random.normal(size=(200, 1)) @ random.normal(size=(1, 6)) * 3  # that classes do not differ by
    y = (centres[labels] + random.normal(size=(200, 6)) + noise) @ turn * 0.3 + 2
    maps = METHODS["anchors"].fit(pair_anchors(x, labels, y[:80], labels[:80]), None, "source")
    assert maps.source is None
    means = np.stack([x[labels == c].mean(0) for c in range(4)])
    mapped = maps.map_target(y[80:])
    nearest = ((mapped[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels[80:]).mean() > 0.9


# -- all -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_fit_pairs__any_split_into_batches_gives_the_same_maps(method: str) -> None:
    x, y = paired(40, 6, 4, seed=3)
    whole = fit_pairs(x, y, method)
    parts = [of(a, b) for a, b in zip(np.split(x, [1, 7, 30]), np.split(y, [1, 7, 30]))]
    merged = parts[0].merge(parts[1]).merge(parts[2]).merge(parts[3])
    again = METHODS[method].fit(merged, METHODS[method].ridge, "source")
    np.testing.assert_allclose(again.map_source(x), whole.map_source(x), atol=1e-9)
    np.testing.assert_allclose(again.map_target(y), whole.map_target(y), atol=1e-9)
    assert json.loads(json.dumps(whole.details)) == whole.details
    tensors = fit_pairs(torch.from_numpy(x), torch.from_numpy(y), method)
    assert isinstance(tensors.map_source(torch.from_numpy(x)), torch.Tensor)
    np.testing.assert_array_equal(tensors.map_source(x), whole.map_source(x))


@pytest.mark.parametrize("into", ["source", "target"])
@pytest.mark.parametrize("method", METHODS)
def test_fit_pairs__a_head_on_mapped_source_features_reads_target_features(method: str, into: Into) -> None:
    """Two models see one hidden cause; a rule learnt on the source's features holds on the target's."""
    random = np.random.default_rng(7)
    hidden = random.normal(size=(300, 4))
    mixing = [np.linalg.qr(random.normal(size=(width, width)))[0][:4] for width in (10, 7)]
    x, y = (hidden @ mix + 0.1 * random.normal(size=(300, mix.shape[1])) for mix in mixing)
    maps = fit_pairs(x[:60], y[:60], method, into=into)
    labels = (hidden[:, 0] + hidden[:, 1] > 0).astype(float)
    source, target = maps.map_source(x), maps.map_target(y)
    assert source.shape[1] == target.shape[1]
    rule = Ridge(1.0).fit(source[60:180], labels[60:180])
    assert ((rule.predict(target[180:]) > 0.5) == labels[180:]).mean() > 0.9


@pytest.mark.parametrize("method", ["ridge", "procrustes"])
def test_fit_pairs__into_the_source_is_into_the_target_with_the_sides_changed(method: str) -> None:
    x, y = paired(40, 6, 4, seed=3)
    there, back = fit_pairs(y, x, method, into="target"), fit_pairs(x, y, method)
    assert back.source is None
    assert there.target is None
    np.testing.assert_allclose(back.map_target(y), there.map_source(y), atol=1e-9)
    np.testing.assert_array_equal(back.map_source(x), x)
    assert back.map_target(y).shape == x.shape
    assert (back.details["into"], there.details["into"]) == ("source", "target")


def test_fit_pairs__passes_its_settings_on() -> None:
    x, y = paired(40, 6, 4, seed=3)
    for given, used in ((None, CCA_RIDGE), (0.5, 0.5)):
        expected = fit_cca(of(x, y), ridge=used, power=CCA_POWER)
        np.testing.assert_array_equal(
            fit_pairs(x, y, "cca", ridge=given).map_source(x), expected.map_source(x)
        )
    found = fit_pairs(x, y, "ridge", ridge=0.5, into="target").details
    assert (found["ridge"], found["into"]) == (0.5, "target")


def test_fit_pairs__refuses() -> None:
    x, y = paired(10, 3, 2, seed=1)
    with pytest.raises(DomainError, match="10 source and 9 target rows"):
        fit_pairs(x, y[:9])
    with pytest.raises(RecipeError, match="Did you mean: ridge"):
        fit_pairs(x, y, "rige")
    for method, least in (("ridge", 3), ("cca", 3), ("procrustes", 2)):
        with pytest.raises(DomainError, match=f"{least - 1} pairs, expected at least {least}"):
            fit_pairs(x[: least - 1], y[: least - 1], method)
    with pytest.raises(DomainError, match="features of 3 dimensions, but the map reads 2"):
        fit_pairs(x, y).map_target(x)
