"""What is taken as features and labels, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from tldist.errors import DomainError
from tldist.features.arrays import as_features, as_labels, choose_rows, like


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32])
def test_as_features__arrays_and_tensors_of_any_number_type(kind: type) -> None:
    values = np.arange(6).reshape(2, 3).astype(kind)
    for given in (values, torch.from_numpy(values), values.tolist(), values[:, ::-1][:, ::-1]):
        found = as_features(given)
        assert found.dtype == torch.float64
        assert found.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_as_features__read_only_arrays_and_gradients_are_left_alone() -> None:
    values = np.ones((2, 2))
    values.flags.writeable = False
    assert as_features(values).shape == (2, 2)
    assert not as_features(torch.ones(2, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.ones(3), r"shape \(3,\), expected \(N, D\)"),
        (np.ones((2, 0)), r"shape \(2, 0\)"),
        (np.ones((0, 2)), "0 rows, expected at least 1"),
        ([["a", "b"]], "cannot be read as numbers"),
        ([[1.0], [float("nan")], [float("inf")]], "2 rows hold NaN or infinity, the first is row 1"),
    ],
)
def test_as_features__refuses(values: Any, words: str) -> None:
    with pytest.raises(DomainError, match=words):
        as_features(values, "my features")


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1], r"shape \(2,\), expected \(3,\)"),
        ([0.0, 1.0, 2.0], "expected whole numbers"),
        ([True, False, True], "expected whole numbers"),
        ([0, -1, 2], "1 rows have no label"),
    ],
)
def test_as_labels__refuses(labels: list[Any], words: str) -> None:
    with pytest.raises(DomainError, match=words):
        as_labels(np.array(labels), 3)


def test_like__gives_back_what_was_given() -> None:
    result = torch.ones(2, 2)
    assert like(result, torch.zeros(1)) is result
    assert isinstance(like(result, np.zeros(1)), np.ndarray)


def test_choose_rows__rising_without_repeats_and_by_seed() -> None:
    rows = choose_rows(100, 20, 1)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert len(rows) == 20
    assert torch.equal(rows, choose_rows(100, 20, 1))
    assert not torch.equal(rows, choose_rows(100, 20, 2))
    assert choose_rows(5, 20, 1).tolist() == [0, 1, 2, 3, 4]
