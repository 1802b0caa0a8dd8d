"""Fusion methods and tensor policies against closed forms in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tldist.errors import BundleError
from tldist.fuse.methods import METHODS, Settings, average, model_shares, wise_ft
from tldist.fuse.policy import kind_of, merge_tensor, pooled_mean, pooled_variance


def tensors(count: int, shape: tuple[int, ...], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5, 5)])
@pytest.mark.parametrize("shares", [(1.0,), (0.5, 0.5), (0.2, 0.3, 0.5), (0.0, 1.0)])
def test_average__weighted_sum(shape: tuple[int, ...], shares: tuple[float, ...]) -> None:
    models = tensors(len(shares), shape)
    expected = np.tensordot(shares, np.stack([model.numpy() for model in models]), axes=1)
    np.testing.assert_allclose(average(models, shares).numpy(), expected, rtol=1e-12)


def test_wise_ft__ends_and_middle() -> None:
    base, *models = tensors(3, (4, 3))
    shares = (0.25, 0.75)
    assert torch.equal(wise_ft(models, base, shares, 0.0), base)
    assert torch.equal(wise_ft(models, base, shares, 1.0), average(models, shares))
    expected = 0.7 * base + 0.3 * (0.25 * models[0] + 0.75 * models[1])
    torch.testing.assert_close(wise_ft(models, base, shares, 0.3), expected)


def test_model_shares__sum_to_one_with_the_bases_first() -> None:
    settings = Settings((0.25, 0.75), alpha=0.4)
    assert model_shares(METHODS["average"], settings, has_base=False) == (0.25, 0.75)
    assert model_shares(METHODS["wise_ft"], settings, has_base=True) == pytest.approx((0.6, 0.1, 0.3))


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.1, 0.2, 0.7), (1.0,)])
def test_pooled_statistics__are_those_of_the_mixture(shares: tuple[float, ...]) -> None:
    """Against the samples themselves: pooled by shares, a mixture's moments."""
    random = np.random.default_rng(0)
    samples = [random.normal(random.normal() * 3, random.uniform(0.5, 2), (1000, 4)) for _ in shares]
    means = [torch.from_numpy(values.mean(0)) for values in samples]
    variances = [torch.from_numpy(values.var(0)) for values in samples]
    weights = np.concatenate([np.full(1000, share / 1000) for share in shares])
    everything = np.concatenate(samples)
    mean = np.average(everything, axis=0, weights=weights)
    variance = np.average((everything - mean) ** 2, axis=0, weights=weights)
    np.testing.assert_allclose(pooled_mean(means, shares), mean, rtol=1e-10)
    np.testing.assert_allclose(pooled_variance(means, variances, shares), variance, rtol=1e-10)


def test_pooled_variance__never_negative_where_the_plain_formula_is() -> None:
    means, variances = (
        [torch.full((3,), 1e8, dtype=torch.float64)] * 2,
        [torch.zeros(3, dtype=torch.float64)] * 2,
    )
    assert (pooled_variance(means, variances, (1 / 3, 2 / 3)) >= 0).all()


def test_kind_of__names_types_and_neighbours() -> None:
    names = {"bn.running_mean", "bn.running_var", "bn.num_batches_tracked", "bn.weight", "x.running_mean"}
    assert kind_of("bn.running_mean", torch.float32, names) == "running_mean"
    assert kind_of("bn.running_var", torch.float32, names) == "running_var"
    assert kind_of("bn.num_batches_tracked", torch.int64, names) == "counter"
    assert kind_of("bn.weight", torch.bfloat16, names) == "learned"
    assert kind_of("x.running_mean", torch.float32, names) == "learned"  # no variance beside it
    assert kind_of("attn.relative_position_index", torch.int64, names) == "constant"


def merge(name: str, values: list[dict[str, torch.Tensor]], shares: tuple[float, ...]) -> torch.Tensor:
    def read(asked: str) -> list[torch.Tensor]:
        return [model[asked] for model in values]

    return merge_tensor(name, values[0].keys(), read, shares, lambda wide: average(wide, shares))


@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merge_tensor__equal_models_are_unchanged_to_the_bit(count: int, dtype: torch.dtype) -> None:
    model = {
        "weight": torch.randn(50, 3).to(dtype),
        "bn.running_mean": torch.randn(9).to(dtype),
        "bn.running_var": torch.rand(9).to(dtype),
        "bn.num_batches_tracked": torch.tensor(17),
        "index": torch.arange(6),
    }
    for name, tensor in model.items():
        merged = merge(name, [model] * count, (1 / count,) * count)
        assert merged.dtype == tensor.dtype
        assert torch.equal(merged, tensor), name


def test_merge_tensor__counters_take_the_most_and_constants_must_agree() -> None:
    models = [{"bn.num_batches_tracked": torch.tensor(n), "index": torch.arange(n)[-2:]} for n in (4, 9, 5)]
    assert int(merge("bn.num_batches_tracked", models, (1 / 3,) * 3)) == 9
    with pytest.raises(BundleError, match="'index' differs"):
        merge("index", models, (1 / 3,) * 3)


def test_merge_tensor__mixed_types_give_the_wider() -> None:
    models = [{"w": torch.ones(3, dtype=torch.float16)}, {"w": torch.full((3,), 2.0)}]
    merged = merge("w", models, (0.5, 0.5))
    assert merged.dtype == torch.float32
    assert merged.tolist() == [1.5] * 3
