"""How far a package's outputs are from PyTorch's, and whether that is near enough. NumPy alone.

Axes: M comparisons (samples times batch sizes), D values of an output.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tldist.export.agreement import Agreement, Flip, GroupAgreement
from tldist.export.profile import Tolerances

SLACK = 8.0
"""A tolerance is widened to this multiple of PyTorch's own float32 error, where that is larger: two correct
float32 implementations are each off by about that much, and the largest error seen varies from one to the
other (up to 6 times was seen on chaotic, untrained networks)."""
FLOOR = 1e-6
"""A group of samples whose outputs are smaller than this share of all others' is held to that share."""
SCATTER = 500
"""Most pairs of values that are kept for the report."""
_EPSILON = float(np.finfo(np.float32).eps)


def compare(
    output: str,
    expected: np.ndarray,
    found: np.ndarray,
    groups: np.ndarray,
    tolerances: Tolerances,
    *,
    referee: np.ndarray | None = None,
    decides: bool = False,
) -> Agreement:
    """Compare one output.

    Args:
        output: its name.
        expected: float32 (M, D), from PyTorch.
        found: float32 (M, D), from the package.
        groups: (M,) of text: the group of samples that each row belongs to. Each has a magnitude and a
            tolerance of its own, so that large values on noise hide no error on pictures.
        tolerances: of the profile.
        referee: float64 (M, D), from PyTorch in float64.
        decides: whether the largest value of a row is a decision.
    """
    if fault := _incomparable(expected, found):
        return Agreement(output, len(found), faults=(fault,))
    parts = tuple(_compare_groups(expected, found, groups, tolerances, referee))
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    flips = tuple(_flips(expected, found, groups, parts)) if decides else ()
    spread = float(np.ptp(expected, axis=0).max() / max(np.abs(expected).max(), np.finfo(np.float32).tiny))
    return Agreement(
        output=output,
        rows=len(expected),
        groups=parts,
        max_absolute=float(error.max()),
        mean_absolute=float(error.mean()),
        spread=spread,
        top1=float((expected.argmax(1) == found.argmax(1)).mean()) if decides else None,
        flips=flips,
        faults=tuple(_faults(parts, flips, len(expected), tolerances.max_flipped)),
        warnings=tuple(_warnings(parts, spread, tolerances.max_relative)),
        pairs=_pairs(expected, found),
    )


def _incomparable(expected: np.ndarray, found: np.ndarray) -> str:
    """Why two matrices cannot be compared, which always fails; empty where they can."""
    if expected.shape != found.shape:
        return f"PyTorch gives {expected.shape}, the package {found.shape}"
    if not np.isfinite(expected).all():
        return "PyTorch's own output is NaN or infinite"
    if not np.isfinite(found).all():
        bad = int((~np.isfinite(found)).any(1).sum())
        return f"the package's output is NaN or infinite on {bad} of {len(found)} rows"
    return ""


def _compare_groups(
    expected: np.ndarray,
    found: np.ndarray,
    groups: np.ndarray,
    tolerances: Tolerances,
    referee: np.ndarray | None,
) -> Iterator[GroupAgreement]:
    least = max(FLOOR * float(np.abs(expected).max()), float(np.finfo(np.float32).tiny))
    for name in dict.fromkeys(groups.tolist()):
        rows = groups == name
        magnitude = max(float(np.abs(expected[rows]).max()), least)
        own_error, own_cosine = None, 1.0
        if referee is not None:
            own_error = relative_error(referee[rows], expected[rows], magnitude)
            own_cosine = smallest_cosine(referee[rows], expected[rows])
        own = SLACK * own_error if own_error is not None else 0.0
        yield GroupAgreement(
            name=str(name),
            rows=int(rows.sum()),
            magnitude=magnitude,
            max_relative=relative_error(expected[rows], found[rows], magnitude),
            cosine=smallest_cosine(expected[rows], found[rows]),
            own_error=own_error,
            own_cosine=own_cosine,
            tolerance=max(tolerances.max_relative, own),
            # Cosine falls with the square of the error, so its slack is squared.
            min_cosine=min(tolerances.min_cosine, 1 - SLACK**2 * (1 - own_cosine)),
            widened=own > tolerances.max_relative,
        )


def relative_error(expected: np.ndarray, found: np.ndarray, magnitude: float) -> float:
    """The largest error relative to ``magnitude``, computed in float64."""
    return float(np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()) / magnitude


def smallest_cosine(expected: np.ndarray, found: np.ndarray) -> float:
    """The smallest cosine of the rows of two (M, D) matrices; rows of (nearly) nothing have no direction."""
    one, other = expected.astype(np.float64), found.astype(np.float64)
    norms = np.linalg.norm(one, axis=1)
    kept = norms > 1e-3 * norms.max()
    if not kept.any():
        return 1.0
    others = np.linalg.norm(other, axis=1).clip(np.finfo(np.float64).tiny)
    return float(((one * other).sum(1)[kept] / (norms * others)[kept]).min())


def _flips(
    expected: np.ndarray, found: np.ndarray, groups: np.ndarray, parts: tuple[GroupAgreement, ...]
) -> Iterator[Flip]:
    """Decisions that changed; where the margin is within PyTorch's own error there was none to change."""
    by_name = {part.name: part for part in parts}
    before, after = expected.argmax(1), found.argmax(1)
    for row in np.flatnonzero(before != after).tolist():
        part = by_name[str(groups[row])]
        margin = float(expected[row, before[row]] - expected[row, after[row]]) / part.magnitude
        if margin > SLACK * max(part.own_error or 0.0, _EPSILON):
            yield Flip(row, part.name, int(before[row]), int(after[row]), margin)


def _faults(
    parts: tuple[GroupAgreement, ...], flips: tuple[Flip, ...], rows: int, max_flipped: float
) -> Iterator[str]:
    if not parts[0].proves:
        yield (
            f"PyTorch's float32 and float64 differ by {parts[0].own_error:.1e} on {parts[0].name} samples: "
            f"the model is too ill-conditioned for parity to be proved"
        )
    for part in parts:
        if part.proves and part.max_relative > part.tolerance:
            yield (
                f"relative error {part.max_relative:.1e} on {part.name} samples, "
                f"tolerance {part.tolerance:.1e}"
            )
        if part.proves and part.cosine < part.min_cosine:
            yield f"cosine {part.cosine:.9f} on {part.name} samples, at least {part.min_cosine:.9f} expected"
    if len(flips) > max_flipped * rows:
        largest = max(flip.margin for flip in flips)
        yield (
            f"{len(flips)} of {rows} decisions flipped (largest relative margin {largest:.1e}), "
            f"at most {max_flipped:.1%} allowed"
        )


def _warnings(parts: tuple[GroupAgreement, ...], spread: float, tolerance: float) -> Iterator[str]:
    if spread <= tolerance:
        yield (
            f"PyTorch's values hardly depend on the image (they change by {spread:.1e} of their magnitude), "
            f"so that this comparison proves little. Is the model trained?"
        )
    for part in parts[1:]:
        if not part.proves:
            yield (
                f"on {part.name} samples PyTorch's float32 and float64 differ by {part.own_error:.1e}; "
                f"they prove nothing and are left out of the verdict"
            )


def _pairs(expected: np.ndarray, found: np.ndarray) -> tuple[tuple[float, float], ...]:
    """At most `SCATTER` pairs of values, the same ones each time."""
    chosen = np.sort(np.random.default_rng(0).permutation(expected.size)[:SCATTER])
    one, other = expected.ravel()[chosen], found.ravel()[chosen]
    return tuple(zip(one.astype(float).tolist(), other.astype(float).tolist()))
