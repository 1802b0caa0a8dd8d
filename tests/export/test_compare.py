"""The figures and the verdict of a comparison, against plain float64 arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tldist.export.compare import SLACK, compare, smallest_cosine
from tldist.export.profile import Tolerances

TOLERANCES = Tolerances(max_relative=1e-4, min_cosine=0.999999, max_flipped=0.0)


def answers(rows: int = 40, width: int = 7, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    groups = np.array(["real"] * (rows - 8) + ["noise"] * 8)
    return random.normal(size=(rows, width)).astype(np.float32), groups


@pytest.mark.parametrize("width", [1, 2, 50])
def test_compare__figures_agree_with_float64(width: int) -> None:
    expected, groups = answers(width=width)
    found = expected + np.random.default_rng(1).normal(size=expected.shape, scale=1e-6).astype(np.float32)
    result = compare("logits", expected, found, groups, TOLERANCES, decides=True)
    one, other = expected.astype(float), found.astype(float)
    assert result.max_absolute == np.abs(one - other).max()
    assert result.mean_absolute == pytest.approx(np.abs(one - other).mean(), rel=1e-12)
    real = groups == "real"
    assert result.groups[0].max_relative == np.abs(one - other)[real].max() / np.abs(one[real]).max()
    cosines = [u @ v / np.sqrt(u @ u * (v @ v)) for u, v in zip(one, other)]
    assert smallest_cosine(expected, found) == pytest.approx(min(cosines), abs=1e-12) or width == 1
    assert result.passed
    assert result.top1 == np.mean(one.argmax(1) == other.argmax(1))
    assert len(result.pairs) == min(500, expected.size)


def test_compare__error_on_small_group_is_not_hidden_by_a_large_one() -> None:
    expected, groups = answers()
    expected[groups == "noise"] *= 1e6
    found = expected.copy()
    found[0, 0] += 0.001  # too little for the cosine to see
    result = compare("logits", expected, found, groups, TOLERANCES)
    assert not result.passed
    assert result.worst is not None
    assert result.worst.name == "real"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["expected", "found", "both"])
def test_compare__not_finite_always_fails(bad: float, where: str) -> None:
    expected, groups = answers()
    found = expected.copy()
    if where != "found":
        expected[3, 2] = bad
    if where != "expected":
        found[3, 2] = bad
    lax = Tolerances(max_relative=1.0, min_cosine=1e-9, max_flipped=1.0)
    result = compare("logits", expected, found, groups, lax, referee=expected.astype(float), decides=True)
    assert not result.passed
    assert "NaN" in result.faults[0]
    json.dumps(result.to_dict(), allow_nan=False)


def test_compare__other_shape_fails() -> None:
    expected, groups = answers()
    assert not compare("logits", expected, expected[:, :-1], groups, TOLERANCES).passed


def test_compare__referee_widens_to_a_multiple_of_own_error() -> None:
    expected, groups = answers()
    referee = expected.astype(float)
    referee[0] += 1e-4 * np.abs(referee[groups == "real"]).max()
    found = expected.copy()
    found[1] += 4e-4 * np.abs(expected[groups == "real"]).max()
    strict = compare("features", expected, found, groups, TOLERANCES)
    assert any("relative error" in fault for fault in strict.faults)
    refereed = compare("features", expected, found, groups, TOLERANCES, referee=referee)
    assert refereed.groups[0].widened
    assert refereed.groups[0].tolerance == pytest.approx(SLACK * 1e-4, rel=1e-3)
    assert not refereed.groups[1].widened  # the referee agrees on noise: nothing is forgiven there
    assert not any("relative error" in fault for fault in refereed.faults)


def test_compare__model_that_disagrees_with_itself_proves_nothing() -> None:
    expected, groups = answers()
    referee = expected.astype(float) * 1.05
    result = compare("features", expected, expected, groups, TOLERANCES, referee=referee)
    assert "ill-conditioned" in result.faults[0]


def test_compare__chaos_on_noise_alone_is_a_warning() -> None:
    expected, groups = answers()
    referee = expected.astype(float)
    referee[groups == "noise"] *= 1.2
    found = expected.copy()
    found[groups == "noise"] *= 1.1
    result = compare("features", expected, found, groups, TOLERANCES, referee=referee)
    assert result.passed
    assert "noise" in result.warnings[0]


def test_compare__flip_fails_with_its_margin() -> None:
    expected, groups = answers(width=3)
    expected[5] = [1.0, 1.0 + 1e-5, 0.0]
    found = expected.copy()
    found[5] = [1.0 + 2e-5, 1.0, 0.0]
    result = compare("logits", expected, found, groups, TOLERANCES, decides=True)
    assert [(flip.row, flip.expected, flip.found) for flip in result.flips] == [(5, 1, 0)]
    magnitude = np.abs(expected[groups == "real"]).max()
    assert result.flips[0].margin == pytest.approx(1e-5 / magnitude, rel=0.05)
    assert not result.passed
    allowed = Tolerances(max_relative=1e-4, min_cosine=0.999999, max_flipped=0.03)
    assert compare("logits", expected, found, groups, allowed, decides=True).passed


def test_compare__tie_is_no_decision() -> None:
    expected, groups = answers(width=3)
    expected[5] = [1.0, 1.0, 0.0]
    found = expected.copy()
    found[5] = [1.0, 1.0 + 1e-7, 0.0]
    result = compare("logits", expected, found, groups, TOLERANCES, decides=True)
    assert result.passed
    assert not result.flips


def test_compare__permuted_columns_fail() -> None:
    expected, groups = answers()
    assert not compare("features", expected, expected[:, ::-1], groups, TOLERANCES).passed


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_compare__constant_outputs_are_called_vacuous(constant: float) -> None:
    expected, groups = answers()
    expected[:] = constant
    result = compare(
        "logits", expected, expected, groups, TOLERANCES, referee=expected.astype(float), decides=True
    )
    assert "hardly depend" in result.warnings[0]
