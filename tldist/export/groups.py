"""The figures of one group of samples, and the tolerances that it is held to. NumPy alone.

Axes: M comparisons of the group, D values of an output.
"""

from __future__ import annotations

import numpy as np

from tldist.export.agreement import GroupAgreement, Source
from tldist.export.profile import Tolerances
from tldist.runtime.reference import EXTREMES, SLACK, largest_error

_EPSILON = float(np.finfo(np.float32).eps)


def compare_group(
    name: str,
    expected: np.ndarray,
    found: np.ndarray,
    tolerances: Tolerances,
    *,
    least: float,
    referee: np.ndarray | None,
    exported: np.ndarray | None,
    fitted: np.ndarray | None,
    probable: float | None,
) -> GroupAgreement:
    """Compare one output on one group.

    Args:
        name: of the group.
        expected: float32 (M, D), from PyTorch.
        found: float32 (M, D), from the package.
        tolerances: of the profile.
        least: smallest magnitude that errors are relative to.
        referee: float64 (M, D), from PyTorch in float64.
        exported: float32 (M, D), from the package where it was made.
        fitted: float32 (M, D), from PyTorch on the pixels of another resize, which rounds otherwise.
        probable: for probabilities, what the tolerance of the logits lets them be off by.
    """
    magnitude = max(float(np.abs(expected).max()), least) if probable is None else 1.0
    own_error, own_cosine = None, 1.0
    if referee is not None:
        own_error = relative_error(referee, expected, magnitude)
        own_cosine = smallest_cosine(referee, expected)
    own = SLACK * (own_error or 0.0)
    resize = 0.0 if fitted is None else relative_error(fitted, expected, magnitude)
    tolerance, source = _tolerance(tolerances.max_relative, own, probable or 0.0, resize)
    # Cosine falls with the square of the error, so its slack is squared. Probabilities have no direction.
    direction = min(tolerances.min_cosine, 1 - SLACK**2 * (1 - own_cosine))
    if fitted is not None:
        direction = min(direction, smallest_cosine(fitted, expected))
    return GroupAgreement(
        name=name,
        rows=len(expected),
        magnitude=magnitude,
        max_relative=relative_error(expected, found, magnitude),
        mean_relative=float(np.abs(found.astype(np.float64) - expected).mean()) / magnitude,
        cosine=smallest_cosine(expected, found),
        own_error=own_error,
        own_cosine=own_cosine,
        tolerance=tolerance,
        source=source,
        max_mean=max(tolerances.max_mean, own, resize, probable or 0.0),
        min_cosine=direction if probable is None else -1.0,
        tie=max(SLACK * _EPSILON, own, tolerances.tie_margin),
        judged=tolerances.extremes == "held" or name not in EXTREMES,
        drift=None if exported is None else relative_error(exported, found, magnitude),
        max_drift=None if exported is None else max(tolerances.max_drift or tolerance, own, resize),
    )


def _tolerance(profile: float, own: float, logits: float, resize: float) -> tuple[float, Source]:
    """The relative error that a group may have, and where that number comes from."""
    allowed: dict[Source, float] = {
        "profile": profile, "logits": logits, "resize": resize, "own error": own,
    }  # fmt: skip
    source = max(allowed, key=lambda name: allowed[name])
    return allowed[source], source


def relative_error(expected: np.ndarray, found: np.ndarray, magnitude: float) -> float:
    """The largest error relative to ``magnitude``, computed in float64."""
    return largest_error(expected, found) / magnitude


def smallest_cosine(expected: np.ndarray, found: np.ndarray) -> float:
    """The smallest cosine of the rows of two (M, D) matrices; rows of (nearly) nothing have no direction."""
    one, other = expected.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(one, axis=1)
    kept = norms > 1e-3 * norms.max()
    if not kept.any():
        return 1.0
    others = np.linalg.norm(other, axis=1).clip(np.finfo(np.float64).tiny)
    return float(((one * other).sum(1)[kept] / (norms * others)[kept]).min())
