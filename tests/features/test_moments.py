"""Moments against numpy's float64, for any split into batches, shards and processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support_processes import run_ranks
from tldist import distributed
from tldist.errors import DomainError
from tldist.features.cross_moments import CrossMoments, cross_moments_of, gather_cross_moments
from tldist.features.moments import (
    Moments,
    RunningMoments,
    gather_moments,
    merge_moments,
    moments_of,
)


def sample(count: int, width: int, seed: int, mean: float = 0.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, width)) @ random.normal(size=(width, width)) + mean


def close(moments: Moments, values: np.ndarray) -> None:
    covariance = np.atleast_2d(np.cov(values, rowvar=False))
    scale = np.abs(covariance).max()
    assert moments.count == len(values)
    np.testing.assert_allclose(moments.mean.numpy(), values.mean(0), rtol=1e-12, atol=1e-10)
    np.testing.assert_allclose(moments.covariance.numpy() / scale, covariance / scale, atol=1e-10)


@pytest.mark.parametrize("cuts", [[], [1], [1, 2, 3, 4], [100], [7, 7, 250, 299], [299]])
@pytest.mark.parametrize(("width", "mean"), [(1, 0.0), (5, 3.0), (17, 1e4)])
def test_moments__any_split_gives_numpys_covariance(cuts: list[int], width: int, mean: float) -> None:
    values = sample(300, width, seed=len(cuts), mean=mean)
    parts = [Moments.from_batch(part) for part in np.split(values, cuts) if len(part)]
    merged = merge_moments(parts)
    assert merged is not None
    close(merged, values)


def test_moments__large_mean_loses_nothing() -> None:
    values = sample(500, 4, seed=3) + 1e8  # a sum of squares would lose all digits here
    merged = merge_moments(Moments.from_batch(part) for part in np.array_split(values, 9))
    assert merged is not None
    close(merged, values)


def test_moments__float32_and_tensors_are_taken() -> None:
    values = sample(40, 3, seed=1).astype(np.float32)
    from_tensor, from_array = Moments.from_batch(torch.from_numpy(values)), Moments.from_batch(values)
    assert from_tensor.mean.dtype == torch.float64
    assert torch.equal(from_tensor.scatter, from_array.scatter)
    close(from_array, values.astype(np.float64))


def test_moments__order_of_merging_does_not_matter() -> None:
    parts = [Moments.from_batch(sample(n, 6, seed=n)) for n in (3, 50, 1, 20)]
    forward, backward = merge_moments(parts), merge_moments(parts[::-1])
    assert forward is not None
    assert backward is not None
    torch.testing.assert_close(forward.covariance, backward.covariance, rtol=1e-12, atol=1e-12)


def test_moments__one_sample_has_no_covariance() -> None:
    with pytest.raises(DomainError, match="at least 2"):
        _ = Moments.from_batch(np.ones((1, 3))).covariance


def test_moments__no_part_is_none() -> None:
    assert merge_moments([]) is None
    assert merge_moments([None, None]) is None


def _gathered(shares: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, int]:
    team = distributed.start()
    mine = shares[team.rank]
    found = gather_moments(Moments.from_batch(mine) if len(mine) else None, team)
    assert found is not None
    return found.mean.numpy(), found.covariance.numpy(), found.count


def test_gather_moments__processes_agree_with_numpy() -> None:
    values = sample(101, 8, seed=5, mean=10.0)
    shares = [values[:40], values[40:40], values[40:]]  # the second process has no sample

    answers = run_ranks(_gathered, 3, shares)
    for mean, covariance, count in answers:
        assert count == 101
        np.testing.assert_allclose(mean, values.mean(0), atol=1e-10)
        np.testing.assert_allclose(covariance, np.cov(values, rowvar=False), atol=1e-10)
        np.testing.assert_array_equal(covariance, answers[0][1])  # to the bit


@settings(max_examples=60, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 120), max_size=8).map(sorted),
    shards=st.integers(1, 4),
    mean=st.sampled_from([0.0, 1.0, 1e4]),
    drift=st.sampled_from([0.0, 100.0]),
    single=st.booleans(),
)
def test_moments__any_batches_in_any_shards(
    cuts: list[int], shards: int, mean: float, drift: float, single: bool
) -> None:
    """To 1e-10 of the largest variance, though the batches' own means lie far from each other."""
    values = sample(120, 4, seed=11, mean=mean) + np.linspace(0, drift, 120)[:, None]
    values = values.astype(np.float32) if single else values
    batches = np.split(values, cuts)
    found = merge_moments(moments_of(batches[rank::shards]) for rank in range(shards))
    assert found is not None
    close(found, values.astype(np.float64))


@pytest.mark.parametrize(("count", "width"), [(5000, 3), (700, 600), (1, 2)])
def test_running_moments__blocks_give_what_one_product_gives(count: int, width: int) -> None:
    """More rows than a block has, and fewer than are waited for."""
    values = np.random.default_rng(0).normal(size=(count, width)) + 5
    found = moments_of(np.array_split(values, 3) if count > 3 else [values])
    assert found is not None
    centred = values - values.mean(0)
    np.testing.assert_allclose(found.scatter.numpy(), centred.T @ centred, atol=1e-9 * count)
    assert torch.equal(found.scatter, found.scatter.T)
    np.testing.assert_allclose(found.mean.numpy(), values.mean(0), atol=1e-12)


def test_running_moments__go_on_after_they_were_read() -> None:
    values = sample(60, 4, seed=2)
    running = RunningMoments()
    running.add(values[:20])
    first = running.moments()
    running.add(values[20:])
    close(first, values[:20])
    close(running.moments(), values)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_as_rows__any_numbers_are_taken(dtype: torch.dtype) -> None:
    values = (torch.arange(12).reshape(4, 3) ** 2 % 7).to(dtype)
    close(Moments.from_batch(values), values.double().numpy())
    if dtype == torch.int32:
        close(Moments.from_batch(values.numpy()), values.double().numpy())


def test_moments__what_is_no_matrix_of_numbers_is_refused() -> None:
    with pytest.raises(DomainError, match="a matrix"):
        Moments.from_batch(np.ones(4))
    with pytest.raises(DomainError, match="numbers"):
        Moments.from_batch(np.array([["a"]]))
    with pytest.raises(DomainError, match="width 3 among others of 4"):
        moments_of([np.ones((2000, 4)), np.ones((2000, 3))])


def test_gather_moments__no_process_has_any() -> None:
    assert run_ranks(_none, 2) == [True, True]


def _none() -> bool:
    return gather_moments(None, distributed.start()) is None


# -- pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[], [1, 50, 51]])
def test_cross_moments__are_numpys(cuts: list[int]) -> None:
    first, second = sample(90, 5, seed=1, mean=3), sample(90, 3, seed=2, mean=-4)
    found = cross_moments_of(zip(np.split(first, cuts), np.split(second.astype(np.float32), cuts)))
    assert found is not None
    second = second.astype(np.float32).astype(np.float64)
    expected = np.cov(np.concatenate([first, second], 1), rowvar=False)
    np.testing.assert_allclose(found.cross_covariance.numpy(), expected[:5, 5:], atol=1e-10)
    np.testing.assert_allclose(found.cross.numpy(), expected[:5, 5:] * 89, atol=1e-8)
    close(found.first, first)
    close(found.second, second)
    merged = CrossMoments.from_batch(first[:30], second[:30]).merge(
        CrossMoments.from_batch(first[30:], second[30:])
    )
    np.testing.assert_allclose(merged.cross_covariance.numpy(), expected[:5, 5:], atol=1e-10)


def test_cross_moments__pairs_are_equally_many() -> None:
    assert cross_moments_of([]) is None
    with pytest.raises(DomainError, match="found 4 and 5"):
        CrossMoments.from_batch(np.ones((4, 2)), np.ones((5, 2)))


def _gathered_pairs(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    team = distributed.start()
    mine = cross_moments_of([(first[team.rank], second[team.rank])])
    found = gather_cross_moments(mine, team)
    assert found is not None
    return found.cross_covariance.numpy()


def test_gather_cross_moments__over_processes() -> None:
    first, second = sample(40, 3, seed=6), sample(40, 2, seed=7)
    cuts = [25, 25]
    answers = run_ranks(_gathered_pairs, 3, np.split(first, cuts), np.split(second, cuts))
    expected = np.cov(np.concatenate([first, second], 1), rowvar=False)[:3, 3:]
    for found in answers:
        np.testing.assert_allclose(found, expected, atol=1e-10)
