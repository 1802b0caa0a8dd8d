"""Alignments against closed forms and an independent float64 computation."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power, subspace_angles
from sklearn.decomposition import PCA

from tldist.align.components import choose_landmarks
from tldist.align.learned import kernel_distance, moment_distance
from tldist.align.methods import (
    METHODS,
    Fit,
    Method,
    coral,
    gfk,
    jda,
    mlp,
    monge,
    pca,
    standardize,
    subspace,
    tca,
    whiten,
)
from tldist.errors import DomainError, RecipeError
from tldist.features.moments import Moments
from tldist.models.transforms import Kernel, Transform

AVAILABLE = [name for name in METHODS if name != "ot" or importlib.util.find_spec("ot")]


def domain(count: int, width: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (
        random.normal(size=(count, width)) @ random.normal(size=(width, width))
        + random.normal(size=width) * 4
    )


def moments(values: np.ndarray) -> Moments:
    return Moments.from_batch(values)


def mapped(values: np.ndarray, transform: torch.nn.Module | None) -> np.ndarray:
    assert transform is not None
    return transform(torch.from_numpy(values)).numpy()


@pytest.mark.parametrize(("width", "ridge"), [(3, 1.0), (8, 0.1), (8, 0.0), (20, 1e-3)])
def test_coral__agrees_with_scipy(width: int, ridge: float) -> None:
    source, target = domain(200, width, 1), domain(150, width, 2)
    fit = coral(moments(source), moments(target), ridge=ridge)
    covariances = [np.cov(values, rowvar=False) for values in (source, target)]
    c_s, c_t = (c + ridge * np.trace(c) / width * np.eye(width) for c in covariances)
    whiten, colour = fractional_matrix_power(c_s, -0.5), fractional_matrix_power(c_t, 0.5)
    expected = (source - source.mean(0)) @ whiten @ colour + target.mean(0)
    np.testing.assert_allclose(mapped(source, fit.source), expected, rtol=1e-6, atol=1e-8)
    assert fit.target is None


def test_coral__is_the_papers_on_standardised_features() -> None:
    source, target = domain(300, 6, 3), domain(200, 6, 4)
    source, target = ((v - v.mean(0)) / v.std(0, ddof=1) for v in (source, target))
    c_s, c_t = (np.cov(values, rowvar=False) + np.eye(6) for values in (source, target))
    expected = source @ fractional_matrix_power(c_s, -0.5) @ fractional_matrix_power(c_t, 0.5)
    fit = coral(moments(source), moments(target), ridge=1.0)
    np.testing.assert_allclose(mapped(source, fit.source), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("width", [1, 4, 30])
def test_coral__source_takes_the_targets_mean_and_covariance(width: int) -> None:
    source, target = domain(400, width, 5), domain(300, width, 6)
    moved = mapped(source, coral(moments(source), moments(target), ridge=0.0).source)
    np.testing.assert_allclose(moved.mean(0), target.mean(0), atol=1e-8)
    np.testing.assert_allclose(
        np.cov(moved, rowvar=False), np.cov(target, rowvar=False), rtol=1e-7, atol=1e-7
    )


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0, 100.0])
def test_coral__one_domain_is_identity(ridge: float) -> None:
    values = domain(100, 7, 7)
    np.testing.assert_allclose(
        mapped(values, coral(moments(values), moments(values), ridge=ridge).source), values, atol=1e-8
    )


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_coral__units_do_not_matter(ridge: float) -> None:
    source, target = domain(100, 5, 8), domain(100, 5, 9)
    plain = mapped(source, coral(moments(source), moments(target), ridge=ridge).source)
    scaled = mapped(source * 1e-3, coral(moments(source * 1e-3), moments(target * 1e3), ridge=ridge).source)
    np.testing.assert_allclose(scaled, plain * 1e3, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 1.0])
def test_coral__fewer_samples_than_dimensions_stays_finite(ridge: float) -> None:
    source, target = domain(10, 40, 10), domain(6, 40, 11)
    moved = mapped(source, coral(moments(source), moments(target), ridge=ridge).source)
    assert np.isfinite(moved).all()
    assert np.abs(moved).max() < 100 * np.abs(target).max()


@pytest.mark.parametrize("ridge", [0.0, 0.01, 1.0])
def test_standardize__closed_form(ridge: float) -> None:
    source, target = domain(80, 9, 12), domain(60, 9, 13)
    fit = standardize(moments(source), moments(target), ridge=ridge)
    for values, transform in ((source, fit.source), (target, fit.target)):
        variance = values.var(0, ddof=1)
        expected = (values - values.mean(0)) / np.sqrt(variance + ridge * variance.mean())
        np.testing.assert_allclose(mapped(values, transform), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
def test_standardize__constant_dimension_is_centred(ridge: float) -> None:
    source, target = domain(50, 3, 14), domain(50, 3, 15)
    source[:, 1], target[:, 1] = 0.1, 7.0
    fit = standardize(moments(source), moments(target), ridge=ridge)
    np.testing.assert_allclose(mapped(source, fit.source)[:, 1], 0, atol=1e-12)
    np.testing.assert_allclose(mapped(target, fit.target)[:, 1], 0, atol=1e-12)


def fitted(name: str, source: np.ndarray, target: np.ndarray, **options: object) -> Fit:
    method = METHODS[name]
    labels = {"source_labels": np.arange(len(source)) % 2} if "source_labels" in method.labels else {}
    few = {"iterations": 3} if "iterations" in method.options else {}
    return method(source, target, **labels, **few, **options)


def finite(fit: Fit, source: np.ndarray, target: np.ndarray) -> bool:
    return bool(np.isfinite(fit.map_source(source)).all() and np.isfinite(fit.map_target(target)).all())


@pytest.mark.parametrize("name", AVAILABLE)
def test_methods__constant_features_give_finite_maps(name: str) -> None:
    flat = np.ones((5, 4))
    assert finite(fitted(name, flat, flat * 2), flat, flat * 2)


@pytest.mark.parametrize("name", AVAILABLE)
@pytest.mark.parametrize(("count", "width"), [(2, 2), (6, 20), (30, 3)])
def test_methods__few_samples_and_a_constant_dimension(name: str, count: int, width: int) -> None:
    source, target = domain(count, width, 20), domain(count + 1, width, 21)
    source[:, 0], target[:, 0] = 1.0, 2.0
    fit = fitted(name, source, target)
    assert finite(fit, source, target)
    assert fit.map_source(source).shape[1] == fit.map_target(target).shape[1]


@pytest.mark.parametrize("name", AVAILABLE)
def test_methods__arrays_tensors_and_both_precisions_are_taken(name: str) -> None:
    source, target = domain(20, 5, 22), domain(25, 5, 23)
    plain = fitted(name, source, target)
    expected = plain.map_source(source)
    tensors = fitted(name, *(torch.from_numpy(part) for part in (source, target)))
    found = tensors.map_source(torch.from_numpy(source))
    assert isinstance(found, torch.Tensor)
    np.testing.assert_array_equal(found.numpy(), expected)
    single = plain.map_source(source.astype(np.float32))
    assert isinstance(single, np.ndarray)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", AVAILABLE)
def test_methods__again_gives_the_same_bits(name: str) -> None:
    source, target = domain(20, 5, 24), domain(25, 5, 25)
    first, second = (fitted(name, source, target) for _ in range(2))
    np.testing.assert_array_equal(first.map_source(source), second.map_source(source))


@pytest.mark.parametrize("name", [n for n in AVAILABLE if n != "none"])
def test_methods__other_widths_and_a_lone_sample_are_refused(name: str) -> None:
    with pytest.raises(DomainError, match="the same space"):
        fitted(name, domain(8, 5, 1), domain(8, 4, 2))
    with pytest.raises(DomainError, match="two"):
        fitted(name, domain(8, 5, 1), domain(1, 5, 2))


@pytest.mark.parametrize("name", ["standardize", "pca", "whiten", "coral", "monge", "subspace", "gfk"])
def test_methods__moments_say_what_samples_say(name: str) -> None:
    source, target = domain(30, 6, 26), domain(40, 6, 27)
    by_samples, by_moments = METHODS[name](source, target), METHODS[name](moments(source), moments(target))
    np.testing.assert_array_equal(by_samples.map_source(source), by_moments.map_source(source))
    assert not METHODS[name].needs_samples({})


def test_method__options_are_those_of_its_function() -> None:
    assert METHODS["coral"].options == {"ridge": 1.0}
    METHODS["coral"].check_options("coral", {"ridge": 0.1})
    with pytest.raises(RecipeError, match=r"dims=3: method=coral has no such option \(it has: ridge\)"):
        METHODS["coral"].check_options("coral", {"dims": 3})
    assert METHODS["jda"].labels == ("source_labels", "target_labels")
    assert METHODS["tca"].needs_samples({"kind": "rbf"})
    assert not METHODS["tca"].needs_samples({"kind": "linear"})
    assert Method(coral).labels == ()


# -- pca, whiten, monge ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 4, 7])
def test_pca__agrees_with_scikit_learn(dims: int) -> None:
    source, target = domain(40, 7, 30), domain(25, 7, 31)
    reference = PCA(dims).fit(np.concatenate([source, target]))
    fit = pca(source, target, dims=dims)
    for values, found in ((source, fit.map_source(source)), (target, fit.map_target(target))):
        expected = reference.transform(values)
        np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=1e-9)
    largest = np.abs(fit.source.weight.numpy()).argmax(1)
    assert (fit.source.weight.numpy()[np.arange(dims), largest] > 0).all()


def test_pca__keeps_what_holds_the_variance() -> None:
    random = np.random.default_rng(3)
    values = random.normal(size=(200, 5)) * [10, 5, 1, 0.1, 0.01]
    shares = np.cumsum(PCA().fit(values).explained_variance_ratio_)
    assert pca(values[:100], values[100:]).notes["dims"] == int((shares < 0.95).sum()) + 1
    with pytest.raises(DomainError, match="1 to 5"):
        pca(values[:100], values[100:], dims=6)


@pytest.mark.parametrize(("kind", "dims"), [("zca", None), ("zca", 3), ("pca", None), ("pca", 3)])
def test_whiten__both_domains_have_the_identity_as_covariance(kind: str, dims: int | None) -> None:
    source, target = domain(60, 6, 32), domain(50, 6, 33)
    fit = whiten(source, target, kind=kind, dims=dims, ridge=0.0)
    for found in (fit.map_source(source), fit.map_target(target)):
        np.testing.assert_allclose(np.cov(found, rowvar=False), np.eye(dims or 6), atol=1e-8)
        np.testing.assert_allclose(found.mean(0), 0, atol=1e-8)


def test_whiten__zca_is_symmetric_and_pca_follows_the_axes() -> None:
    source, target = domain(60, 6, 34), domain(50, 6, 35)
    weight = whiten(source, target, ridge=0.0).source.weight.numpy()
    np.testing.assert_allclose(weight, fractional_matrix_power(np.cov(source, rowvar=False), -0.5), atol=1e-8)
    fit = whiten(source, target, kind="pca", ridge=0.0)
    expected = PCA(whiten=True).fit_transform(source)
    found = fit.map_source(source)
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=1e-8)
    assert ((fit.source.weight * fit.target.weight).sum(1) > 0).all()  # on the same side
    with pytest.raises(RecipeError, match="zca and pca"):
        whiten(source, target, kind="cholesky")


@pytest.mark.parametrize("width", [1, 5])
def test_monge__is_symmetric_and_gives_the_targets_covariance(width: int) -> None:
    """The transport map between Gaussians is the gradient of a convex function: symmetric, positive."""
    source, target = domain(90, width, 36), domain(70, width, 37)
    fit = monge(source, target, ridge=0.0)
    weight = fit.source.weight.numpy()
    np.testing.assert_allclose(weight, weight.T, atol=1e-9)
    assert np.linalg.eigvalsh(weight).min() > 0
    moved = fit.map_source(source)
    np.testing.assert_allclose(np.cov(moved.T), np.cov(target.T), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(moved.mean(0), target.mean(0), atol=1e-9)


# -- subspace, gfk -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "dims"), [(4, 1), (6, 3), (12, 4)])
def test_gfk__is_the_integral_along_the_geodesic(width: int, dims: int) -> None:
    """Eq. 4 of the paper by quadrature, the geodesic by matrix exponentials in the place of angles."""
    source, target = domain(40, width, 40), domain(50, width, 41)
    factor = gfk(source, target, dims=dims).target.weight.numpy()
    assert factor.shape == (2 * dims, width)
    start, end = (PCA(dims).fit(values).components_.T for values in (source, target))
    # The tangent at the start that leads to the end (Edelman et al. 1998, section 2.5.1).
    inverse = np.linalg.inv(start.T @ end)
    left, tangents, right = np.linalg.svd(end @ inverse - start, full_matrices=False)
    angles = np.arctan(tangents)
    places, weights = np.polynomial.legendre.leggauss(24)
    expected = np.zeros((width, width))
    for place, weight in zip((places + 1) / 2, weights / 2):
        basis = (start @ right.T * np.cos(place * angles) + left * np.sin(place * angles)) @ right
        expected += weight * basis @ basis.T
    np.testing.assert_allclose(factor.T @ factor, expected, atol=1e-9)


def test_gfk__one_domain_gives_its_own_subspace() -> None:
    values = domain(50, 6, 42)
    axes = PCA(2).fit(values).components_
    factor = gfk(values, values, dims=2).source.weight.numpy()
    np.testing.assert_allclose(factor.T @ factor, axes.T @ axes, atol=1e-7)
    with pytest.raises(DomainError, match="1 to 3"):
        gfk(values, values, dims=4)


def test_subspace__one_domain_is_its_own_components() -> None:
    values = domain(50, 6, 43)
    fit = subspace(values, values, dims=3)
    np.testing.assert_allclose(fit.map_source(values), fit.map_target(values), atol=1e-9)


# -- tca, jda ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rbf", "linear"])
def test_tca__components_are_the_papers_eigenvectors(kind: str) -> None:
    """Eq. 11 of the paper, with matrices over all samples, by the eigenvectors of a general matrix."""
    source, target = domain(15, 4, 50), domain(12, 4, 51)
    fit = tca(source, target, dims=3, kind=kind, mu=0.3, gamma=0.05)
    values = np.concatenate([source, target])
    lifted = values.T  # M by N
    if kind == "rbf":
        lifted = np.exp(-0.05 * ((values[:, None] - values) ** 2).sum(2))
    apart = np.concatenate([np.full(15, 1 / 15), np.full(12, -1 / 12)])
    centring = np.eye(27) - 1 / 27
    left = lifted @ np.outer(apart, apart) @ lifted.T + 0.3 * np.eye(len(lifted))
    roots, vectors = np.linalg.eig(np.linalg.solve(left, lifted @ centring @ lifted.T))
    expected = np.real(vectors[:, np.argsort(-np.real(roots))[:3]]).T
    found = fit.source.weight.numpy()
    side = np.sign((found * expected).sum(1))[:, None]
    np.testing.assert_allclose(found * side, expected, atol=1e-7)
    both = np.concatenate([fit.map_source(source), fit.map_target(target)])
    np.testing.assert_allclose(both.mean(0), 0, atol=1e-9)


def test_tca__brings_the_means_together() -> None:
    source = domain(80, 6, 52)
    target = source[:70] + 8.0

    def gap(fit: Fit) -> float:
        ends = fit.map_source(source), fit.map_target(target)
        return float(np.abs(ends[0].mean(0) - ends[1].mean(0)).max() / np.concatenate(ends).std())

    assert gap(tca(source, target, dims=3, kind="linear", ridge=1e-3)) < 0.05 * gap(
        pca(source, target, dims=3)
    )
    assert gap(tca(source, target, dims=3, ridge=1e-3)) < 0.05 * gap(pca(source, target, dims=3))


def test_tca__few_landmarks_are_near_all() -> None:
    source, target = domain(300, 3, 53), domain(300, 3, 54)
    exact, few = tca(source, target, dims=2), tca(source, target, dims=2, landmarks=150)
    assert isinstance(few.source, Kernel)
    assert few.source.landmarks.shape == (150, 3)
    ends = (fit.map_target(target) for fit in (exact, few))
    angles = subspace_angles(*(end - end.mean(0) for end in ends))
    assert np.degrees(angles).max() < 5


@pytest.mark.parametrize(("few", "many", "count"), [(10, 50, 30), (50, 10, 30), (4, 50, 30), (20, 20, 9)])
def test_choose_landmarks__as_even_as_can_be(few: int, many: int, count: int) -> None:
    source, target = torch.zeros(few, 2), torch.ones(many, 2)
    found = choose_landmarks(source, target, count, 0)
    assert len(found) == count
    of_target = int(found[:, 0].sum())
    assert min(of_target, count - of_target) == min(few, many, count // 2)
    assert torch.equal(found, choose_landmarks(source, target, count, 0))


def test_tca__what_makes_no_sense_is_refused() -> None:
    source, target = domain(10, 3, 55), domain(10, 3, 56)
    for options, words in (({"kind": "poly"}, "rbf and linear"), ({"ridge": 0.0}, "above 0")):
        with pytest.raises(RecipeError, match=words):
            tca(source, target, **options)
    with pytest.raises(RecipeError, match="kind=linear does"):
        tca(moments(source), moments(target))
    with pytest.raises(DomainError, match="1 to 19"):
        tca(source, target, dims=20)
    linear = tca(moments(source), moments(target), kind="linear", dims=2)
    np.testing.assert_allclose(
        linear.map_source(source), tca(source, target, kind="linear", dims=2).map_source(source), atol=1e-9
    )


def classes(count: int, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes whose means move by ``shift``, each its own way, which says nothing of the class."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    centres = 5 * np.eye(7)[:3] + shift * np.eye(7)[3:6]
    return centres[labels] + random.normal(size=(count, 7)), labels


def class_gap(fit: Fit, source: np.ndarray, target: np.ndarray, known: tuple[np.ndarray, ...]) -> float:
    """The largest distance of a class's means, against the spread of all."""
    ends = fit.map_source(source), fit.map_target(target)
    means = [[end[labels == c].mean(0) for c in range(3)] for end, labels in zip(ends, known)]
    return float(np.linalg.norm(np.subtract(*means), axis=1).max() / np.concatenate(ends).std())


def test_jda__classes_meet_and_known_labels_are_not_guessed() -> None:
    (source, labels), (target, truth) = classes(90, 0.0, 60), classes(60, 3.0, 61)
    known = (labels, truth)
    fit = jda(source, target, labels, dims=2, ridge=0.01)
    assert fit.notes["changed"][-1] == 0
    means_alone = tca(source, target, dims=2, kind="linear", ridge=0.01)
    assert class_gap(fit, source, target, known) < 0.05 * class_gap(means_alone, source, target, known)
    wrong = (truth + 1) % 3  # told, so believed
    told = jda(source, target, labels, wrong, dims=2, ridge=0.01)
    assert told.notes["changed"] == [60, 0]
    wrongly = (labels, wrong)
    assert class_gap(told, source, target, wrongly) < class_gap(fit, source, target, wrongly)
    with pytest.raises(DomainError, match="every source sample"):
        jda(source, target, np.where(labels == 0, -1, labels))
    with pytest.raises(DomainError, match="60 samples and labels"):
        jda(source, target, labels, truth[:5])


# -- mlp ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coral", "mmd"])
def test_mlp__brings_domains_together_and_keeps_classes_apart(kind: str) -> None:
    (source, labels), (target, _) = classes(150, 0.0, 70), classes(120, 2.0, 71)
    target = np.abs(target) ** 1.3  # no affine map undoes that

    def gap(fit: Fit) -> float:
        ends = (torch.from_numpy(fit.map_source(source)), torch.from_numpy(fit.map_target(target)))
        return float(kernel_distance(*ends))

    free = mlp(source, target, labels, kind=kind, iterations=150, hidden=32, seed=1, strength=0.0)
    fit = mlp(source, target, labels, kind=kind, iterations=150, hidden=32, seed=1)
    assert gap(fit) < 0.6 * gap(free)
    space = fit.map_source(source)
    means = np.stack([space[labels == c].mean(0) for c in range(3)])
    nearest = ((space[:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == labels).mean() > 0.95
    other = mlp(source, target, labels, kind=kind, iterations=150, hidden=32, seed=2)
    assert not np.array_equal(other.map_source(source), space)


def test_mlp__starts_from_the_principal_components() -> None:
    source, target = domain(40, 5, 72), domain(30, 5, 73)
    found = mlp(source, target, np.arange(40) % 2, iterations=0, dims=3).map_source(source)
    expected = pca(source, target, dims=3).map_source(source)
    ratio = np.linalg.norm(expected) / np.linalg.norm(found)
    np.testing.assert_allclose(found * ratio, expected, atol=1e-9)


def test_mlp__where_the_features_lie_does_not_matter() -> None:
    (source, labels), (target, _) = classes(30, 0.0, 76), classes(30, 1.0, 77)
    plain, moved = (mlp(source + far, target + far, labels, iterations=5, hidden=8) for far in (0.0, 50.0))
    np.testing.assert_allclose(moved.map_target(target + 50), plain.map_target(target), atol=1e-7)


def test_mlp__known_target_labels_are_learned() -> None:
    (source, labels), (target, truth) = classes(60, 0.0, 78), classes(60, 4.0, 79)
    gaps = []
    for known in (truth, np.full(60, -1)):
        fit = mlp(source, target, labels, known, iterations=100, hidden=32, strength=0.0)
        gaps.append(class_gap(fit, source, target, (labels, truth)))
    assert gaps[0] < 0.95 * gaps[1]


def test_distances__closed_forms() -> None:
    first, second = (torch.from_numpy(domain(20, 4, seed)) for seed in (74, 75))
    assert float(moment_distance(first, first)) == 0
    apart = np.cov(first.T) - np.cov(second.T)
    means = first.mean(0) - second.mean(0)
    expected = ((apart**2).sum() + float(means.square().sum())) / 4
    assert float(moment_distance(first, second)) == pytest.approx(expected)
    both = torch.cat([first, second])
    squares = torch.cdist(both, both).square()
    total = 0.0
    for width in (0.25, 0.5, 1.0, 2.0, 4.0):
        k = (-squares / (width * squares.mean())).exp()
        total += float(k[:20, :20].mean() + k[20:, 20:].mean() - 2 * k[:20, 20:].mean()) / 5
    assert float(kernel_distance(first, second)) == pytest.approx(total, rel=1e-9)


# -- ot ----------------------------------------------------------------------------------------------------


def test_ot__moves_samples_to_the_means_of_their_plan() -> None:
    library = pytest.importorskip("ot")
    source, target = domain(12, 3, 80), domain(15, 3, 81)
    fit = METHODS["ot"](source, target, kind="emd")
    cost = ((source[:, None] - target) ** 2).sum(2)
    plan = library.emd(np.full(12, 1 / 12), np.full(15, 1 / 15), cost)
    np.testing.assert_allclose(fit.map_source(source), plan @ target * 12, atol=1e-9)
    assert fit.target is None
    near = source + 1e-6  # a new sample goes with its nearest
    np.testing.assert_allclose(fit.map_source(near) - near, fit.map_source(source) - source, atol=1e-9)


def test_ot__labels_keep_classes_apart() -> None:
    pytest.importorskip("ot")
    (source, labels), (target, truth) = classes(30, 0.0, 82), classes(30, 1.0, 83)
    fit = METHODS["ot"](source, target, labels)
    moved = fit.map_source(source)
    means = np.stack([target[truth == c].mean(0) for c in range(3)])
    assert (((moved[:, None] - means) ** 2).sum(2).argmin(1) == labels).all()
    with pytest.raises(RecipeError, match="entropic and emd"):
        METHODS["ot"](source, target, kind="linear")


def test_fit__maps_are_modules_that_can_be_called() -> None:
    source, target = domain(20, 4, 90), domain(20, 4, 91)
    fit = subspace(source, target, dims=2)
    assert isinstance(fit.target, Transform)
    called = fit.target(torch.from_numpy(target)).numpy()
    np.testing.assert_array_equal(called, fit.target.transform(target))
    np.testing.assert_array_equal(METHODS["none"](source, target).map_target(target), target)
