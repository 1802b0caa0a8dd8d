"""Moments against numpy's float64, for any split into batches, shards and processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support_processes import run_ranks
from tldist import distributed
from tldist.errors import DomainError
from tldist.features.moments import Moments, gather_moments, merge_moments


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
