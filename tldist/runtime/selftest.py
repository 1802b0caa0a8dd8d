"""The self-test of an opened package: whether this machine computes what was certified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tldist.errors import PackageError
from tldist.runtime.reference import EXTREMES, Reference
from tldist.runtime.session import Session

SAMPLES = 4
"""Stored images that a self-test runs: one of each group, then more of the first one, which are pictures."""
SLACK = 8.0
"""Multiple of PyTorch's own float32 error that is allowed where the package's own answers are not stored."""


def find_problems(
    session: Session, reference: Reference, tolerances: Mapping[str, Any], samples: int | None = SAMPLES
) -> list[str]:
    """Run stored images and compare with the stored answers: a line for each output that differs.

    The answers are those that the package itself gave where it was made, held to ``max_drift``; where they
    are not stored, PyTorch's, held to ``max_relative``. Errors are relative to the largest value of the
    output on the group of samples. NaN and infinity always differ.

    Args:
        session: the loaded graph.
        reference: what the package carries.
        tolerances: of the package's profile.
        samples: how many images; None: all.

    Raises:
        PackageError: the reference belongs to another graph, or the profile has no tolerances.
    """
    stored = reference.exported or reference.expected
    if set(stored) != set(session.outputs):
        raise PackageError(
            f"its reference samples answer {', '.join(stored) or 'nothing'}, its graph gives "
            f"{', '.join(session.outputs)}; they do not belong together."
        )
    rows = _choose(reference, samples)
    chosen = reference.take(rows)
    found = run_samples(session, chosen)
    groups, of_all = chosen.samples.group_of, reference.samples.group_of
    problems = []
    for name in session.outputs:
        for group in dict.fromkeys(groups.tolist()):
            magnitude = _magnitude(stored[name], of_all == group)
            limit = _tolerance(reference, name, of_all == group, magnitude, tolerances)
            if group in EXTREMES and tolerances.get("extremes") == "reported":
                limit = np.inf  # held to finite values alone
            error = _error(stored[name][rows][groups == group], found[name][groups == group]) / magnitude
            if not (np.isfinite(error) and error <= limit):
                problems.append(
                    f"output '{name}' is off by {error:.1e} of its largest value on {group} samples, "
                    f"tolerance {limit:.1e}"
                )
    return problems


def run_samples(session: Session, reference: Reference) -> dict[str, np.ndarray]:
    """What a session answers to stored images, those of one size together: float32 (N, D), by output.

    Raises:
        PackageError: the graph does not take images of their size.
    """
    found = {
        name: np.empty((len(reference.samples), width), np.float32) for name, width in session.outputs.items()
    }
    for rows, images in reference.samples.by_size():
        for name, values in session.run(images).items():
            found[name][rows] = values
    return found


def _choose(reference: Reference, samples: int | None) -> np.ndarray:
    """Positions of the images to run, in rising order."""
    groups = reference.samples.group_of
    if samples is None or samples >= len(groups):
        return np.arange(len(groups))
    _, first = np.unique(groups, return_index=True)
    order = dict.fromkeys([*sorted(first.tolist()), *range(len(groups))])
    return np.array(sorted(list(order)[:samples]))


def _magnitude(values: np.ndarray, rows: np.ndarray) -> float:
    """The largest value of a group; where that is nearly nothing, a millionth of the largest of all."""
    return max(float(np.abs(values[rows]).max()), 1e-6 * float(np.abs(values).max())) or 1.0


def _tolerance(
    reference: Reference, name: str, rows: np.ndarray, magnitude: float, tolerances: Mapping[str, Any]
) -> float:
    try:
        widest = float(tolerances["max_relative"])
        drift = tolerances.get("max_drift")
        limit = widest if drift is None else float(drift)
    except (KeyError, TypeError, ValueError) as error:
        raise PackageError(f"its profile has no tolerances to hold it to: {error}.") from error
    if reference.exported:
        return limit
    referee = reference.referee.get(name)
    own = 0.0 if referee is None else _error(referee[rows], reference.expected[name][rows]) / magnitude
    return max(widest, SLACK * own)


def _error(expected: np.ndarray, found: np.ndarray) -> float:
    """The largest difference, computed in float64; NaN or infinite where a value is."""
    if expected.shape != found.shape:
        return float("inf")
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max())


def explain(problems: list[str], session: Session) -> str:
    """The problems and what to do about them, for people."""
    version = session.describe()["onnxruntime"]
    return (
        f"self-test failed on {session.provider} of ONNX Runtime {version}: {'; '.join(problems)}. "
        f"This machine computes something else than what was certified. `tldist parity PACKAGE` compares all "
        f"samples; use the ONNX Runtime that parity.json names, or export again for this machine "
        f"(self_test=False opens the package as it is)."
    )
