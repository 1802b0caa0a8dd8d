"""Methods in weight space against closed forms in float64, and their properties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tldist.errors import BundleError
from tldist.fuse.weights.linear import Array, gram, model_stock_ratio, multi_slerp_coefficients
from tldist.fuse.weights.merge import model_shares
from tldist.fuse.weights.method import Method, Piece, Settings, own_method
from tldist.fuse.weights.methods import METHODS
from tldist.fuse.weights.policy import (
    common_constant,
    kind_of,
    largest_count,
    pooled_mean,
    pooled_variance,
    widest,
)
from tldist.fuse.weights.sparse import random_mask, top_band, trimmed

SHAPES = [(), (5,), (3, 4), (2, 3, 5, 5)]
PLAIN = [name for name, method in METHODS.items() if method.aid is None]


def arrays(count: int, shape: tuple[int, ...], seed: int = 0) -> list[Array]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape), np.float32) for _ in range(count)]


def apply(name: str, models: list[Array], base: Array | None = None, **settings: object) -> Array:
    weights = settings.pop("weights", (1.0,) * len(models))
    return METHODS[name].apply(Piece("t", models, base), Settings(weights, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.5), (2.0, 3.0, 5.0), (0.0, 1.0)])
def test_average__is_the_weighted_mean(shape: tuple[int, ...], weights: tuple[float, ...]) -> None:
    models = arrays(len(weights), shape)
    expected = np.average(np.stack(models).astype(np.float64), axis=0, weights=weights)
    np.testing.assert_allclose(apply("average", models, weights=weights), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["average", "multi_slerp", "wise_ft", "model_stock"])
def test_means__of_equal_models_are_the_model(name: str) -> None:
    (model, base) = arrays(2, (17, 5))
    found = apply(name, [model] * 5, base, alpha=1.0)
    np.testing.assert_allclose(found, model, rtol=1e-6, atol=1e-6)
    assert np.array_equal(apply("average", [model] * 7), model)


def test_wise_ft__is_exact_at_both_ends() -> None:
    base, *models = arrays(3, (40, 3))
    assert np.array_equal(apply("wise_ft", models, base, alpha=0.0), base)
    assert np.array_equal(apply("wise_ft", models, base, alpha=1.0), apply("average", models))
    expected = 0.7 * base.astype(float) + 0.15 * (models[0].astype(float) + models[1])
    np.testing.assert_allclose(apply("wise_ft", models, base, alpha=0.3), expected, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_task_arithmetic__adds_task_vectors(shape: tuple[int, ...]) -> None:
    base, *models = (a.astype(np.float64) for a in arrays(4, shape))
    expected = base + 0.6 * sum(w * (m - base) for w, m in zip((1, 2, 3), models))
    narrow = [np.float32(m) for m in models]
    found = apply("task_arithmetic", narrow, np.float32(base), weights=(1, 2, 3), scale=0.6)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_slerp__turns_by_a_share_of_the_angle_and_keeps_a_common_length(alpha: float) -> None:
    first, second = arrays(2, (30, 9), seed=3)
    second *= np.linalg.norm(first) / np.linalg.norm(second)
    found = apply("slerp", [first, second], alpha=alpha).astype(float)

    def angle(a: Array, b: Array) -> float:
        return float(np.arccos(np.clip((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b), -1, 1)))

    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(first), rel=1e-6)
    assert angle(first, found) == pytest.approx(alpha * angle(first, second), abs=1e-3)


def test_multi_slerp__of_two_is_slerp() -> None:
    first, second = arrays(2, (11, 7))
    second *= np.linalg.norm(first) / np.linalg.norm(second)
    found = apply("multi_slerp", [first, second], weights=(0.7, 0.3))
    np.testing.assert_allclose(found, apply("slerp", [first, second], alpha=0.3), rtol=1e-5, atol=1e-6)


def test_multi_slerp__is_where_the_tangents_cancel() -> None:
    models = [m.astype(np.float64).reshape(-1) for m in arrays(4, (6, 8))]
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    mean = sum(c * m for c, m in zip(multi_slerp_coefficients(gram(models, None), shares), models))
    mean /= np.linalg.norm(mean)
    total = np.zeros(48)
    for share, model in zip(shares, models):
        unit = model / np.linalg.norm(model)
        angle = np.arccos(unit @ mean)
        total += share * angle / np.sin(angle) * (unit - (unit @ mean) * mean)
    assert np.abs(total).max() < 1e-10


def test_model_stock__goes_by_the_mean_angle() -> None:
    base, *models = arrays(4, (50, 4))
    deltas = [m.astype(float) - base for m in models]
    cosines = [
        (a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b)
        for i, a in enumerate(deltas)
        for b in deltas[i + 1 :]
    ]
    cosine = np.mean(cosines)
    expected = 3 * cosine / (1 + 2 * cosine)
    assert model_stock_ratio(gram(models, base)) == pytest.approx(expected)
    found = apply("model_stock", models, base)
    np.testing.assert_allclose(found, base + expected * np.mean(deltas, axis=0), rtol=1e-5, atol=1e-5)
    assert model_stock_ratio(np.zeros((2, 2))) == 0.0  # nothing was learned


@given(st.integers(1, 60), st.floats(0.01, 1.0), st.integers(0, 99))
def test_trim__keeps_the_largest_changes(size: int, density: float, seed: int) -> None:
    model, base = arrays(2, (size,), seed)
    delta = model - base
    found = trimmed(model, base, top_band(model, base, density))
    kept = max(1, int(density * size)) if density < 1 else size
    expected = np.sort(np.abs(delta))[::-1][:kept]
    np.testing.assert_array_equal(np.sort(np.abs(found[found != 0]))[::-1], expected[expected != 0])
    np.testing.assert_array_equal(found[found != 0], delta[found != 0])


def test_ties__by_hand() -> None:
    """Of each model the two largest stay; in the second column the larger sum decides the sign."""
    base = np.zeros((1, 3), np.float32)
    models = [np.float32([[1.0, 3.0, 0.1]]), np.float32([[2.0, -1.0, 0.2]]), np.float32([[3.0, 2.0, -4.0]])]
    found = apply("ties", models, base, density=2 / 3, scale=0.5)
    np.testing.assert_allclose(found, 0.5 * np.float32([[2.0, 3.0, -4.0]]), rtol=1e-6)


def test_dare__keeps_the_task_vectors_in_expectation() -> None:
    base, *models = arrays(3, (20, 10))
    full = apply("task_arithmetic", models, base, scale=0.4)
    runs = [apply("dare_linear", models, base, scale=0.4, density=0.3, seed=seed) for seed in range(3000)]
    spread = np.std(runs, axis=0) / np.sqrt(len(runs))
    assert np.abs(np.mean(runs, axis=0) - full).max() < 5 * spread.max()
    np.testing.assert_allclose(apply("dare_linear", models, base, scale=0.4), full, rtol=1e-5, atol=1e-6)


def test_random_mask__depends_on_the_place_alone() -> None:
    key = (3, "layer.weight", 1)
    whole = random_mask(key, 0, (40, 25), 0.3).reshape(-1)
    pieces = [random_mask(key, start, (min(64, 1000 - start),), 0.3) for start in range(0, 1000, 64)]
    np.testing.assert_array_equal(np.concatenate(pieces), whole)
    many = random_mask(key, 0, (200_000,), 0.3)
    assert many.mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.3 * 0.7 / 200_000))
    others = [(4, "layer.weight", 1), (3, "layer.bias", 1), (3, "layer.weight", 0)]
    for other in others:
        agree = (random_mask(other, 0, (200_000,), 0.3) == many).mean()
        assert agree == pytest.approx(0.3**2 + 0.7**2, abs=0.01)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(7,), (6, 5), (2, 3, 3, 3)])
def test_methods__keep_shape_and_leave_their_inputs_alone(name: str, shape: tuple[int, ...]) -> None:
    base, *models = arrays(3, shape)
    copies = [array.copy() for array in (base, *models)]
    found = apply(name, models, base, density=0.5, gamma=0.1, scale=0.5)
    assert found.shape == shape
    assert found.dtype == np.float32
    assert np.isfinite(found).all()
    assert all(np.array_equal(array, copy) for array, copy in zip((base, *models), copies))


@pytest.mark.parametrize("name", PLAIN)
def test_methods__of_zeros_and_constants_are_finite(name: str) -> None:
    for value in (0.0, 1.0):
        same = np.full((4, 4), value, np.float32)
        found = apply(name, [same, same], same, density=0.5, gamma=0.1, scale=0.5)
        np.testing.assert_allclose(found, same, atol=1e-6)


def test_own_method__sees_models_base_and_settings() -> None:
    def median(models: list[Array], base: Array, settings: Settings) -> Array:
        return base + settings.scale * np.median([m - base for m in models], axis=0)

    base, *models = arrays(4, (3, 2))
    method = own_method(median)
    found = method.apply(Piece("t", models, base), Settings((1.0,) * 3, scale=0.5))
    np.testing.assert_allclose(found, base + 0.5 * (np.median(models, axis=0) - base), rtol=1e-5)


# -- what is not learned -----------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1e4), st.floats(0.01, 1)), min_size=1, max_size=5)
)
def test_pooled__is_mean_and_variance_of_the_mixture(parts: list[tuple[float, float, float]]) -> None:
    means, variances, weights = (np.array(column) for column in zip(*parts))
    shares = weights / weights.sum()
    pairs = [np.array([m]) for m in means], [np.array([v]) for v in variances]
    found = pooled_variance(*pairs, shares)[0]
    mean = float(shares @ means)
    expected = shares @ (variances + (means - mean) ** 2)
    assert pooled_mean(pairs[0], shares)[0] == pytest.approx(mean, rel=1e-9, abs=1e-9)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert found >= 0


def test_kind_of__by_name_type_and_neighbours() -> None:
    names = {"bn.running_mean", "bn.running_var", "x.running_mean", "bn.num_batches_tracked"}
    assert kind_of("bn.running_mean", "F32", names) == "running_mean"
    assert kind_of("bn.running_var", "F32", names) == "running_var"
    assert kind_of("x.running_mean", "F32", names) == "learned"  # no variance beside it
    assert kind_of("running_var", "F32", {"running_mean", "running_var"}) == "running_var"
    assert kind_of("bn.num_batches_tracked", "I64", names) == "counter"
    assert kind_of("index", "I64", names) == "constant"
    assert kind_of("mask", "BOOL", names) == "constant"
    assert kind_of("fc.weight", "BF16", names) == "learned"


def test_policy__counters_constants_and_types() -> None:
    assert largest_count([np.array(3), np.array(9), np.array(4)]) == 9
    assert common_constant("i", [np.arange(3), np.arange(3)]).tolist() == [0, 1, 2]
    with pytest.raises(BundleError, match="constant 'i' differs"):
        common_constant("i", [np.arange(3), np.zeros(3, int)])
    assert widest(["BF16", "BF16"]) == "BF16"
    assert widest(["BF16", "F16"]) == "F32"
    assert widest(["F32", "F64"]) == "F64"


@pytest.mark.parametrize("name", METHODS)
def test_shares__have_sum_one(name: str) -> None:
    method: Method = METHODS[name]
    for scale in (0.1, 0.5, 2.0):
        settings = Settings((1.0, 3.0), alpha=0.3, scale=scale)
        for has_base in (False, True):
            shares = model_shares(method, settings, has_base)
            assert sum(shares) == pytest.approx(1)
            assert min(shares) >= 0
            assert len(shares) == 2 + has_base
