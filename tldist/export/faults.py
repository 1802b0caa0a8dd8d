"""What figures mean, in words: why an output fails, and what makes a comparison say less than it seems to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tldist.export.agreement import Flip, GroupAgreement
from tldist.export.neighbours import MOST
from tldist.export.profile import Tolerances


def group_faults(parts: Sequence[GroupAgreement]) -> Iterator[str]:
    """What is beyond tolerance on each group of samples."""
    if not parts[0].proves:
        yield (
            f"PyTorch's float32 and float64 differ by {parts[0].own_error:.1e} on {parts[0].name} samples: "
            f"the model is too ill-conditioned for parity to be proved"
        )
    for part in parts:
        if part.counts:
            yield from _value_faults(part)
        if part.proves and part.drift is not None and part.max_drift and part.drift > part.max_drift:
            yield (
                f"the package answers otherwise here than where it was made: by {part.drift:.1e} on "
                f"{part.name} samples, tolerance {part.max_drift:.1e}"
            )


def _value_faults(part: GroupAgreement) -> Iterator[str]:
    if part.max_relative > part.tolerance:
        yield f"relative error {part.max_relative:.1e} on {part.name} samples, tolerance {part.tolerance:.1e}"
    if part.mean_relative > part.max_mean:
        yield (
            f"mean relative error {part.mean_relative:.1e} on {part.name} samples, "
            f"tolerance {part.max_mean:.1e}"
        )
    if part.cosine < part.min_cosine:
        yield f"cosine {part.cosine:.9f} on {part.name} samples, at least {part.min_cosine:.9f} expected"


def decision_faults(flips: Sequence[Flip], decisions: int, allowed: float) -> Iterator[str]:
    """Decisions that flipped, where there are more of ``decisions`` than the profile allows."""
    if len(flips) > allowed * decisions:
        largest = max(flip.margin for flip in flips)
        yield (
            f"{len(flips)} of {decisions} decisions flipped (largest relative margin {largest:.1e}), "
            f"at most {allowed:.1%} allowed"
        )


def neighbour_faults(k: int | None, shared: float | None, least: float) -> Iterator[str]:
    """Embeddings that lost too many of their neighbours."""
    if shared is not None and shared < least:
        yield f"{shared:.1%} of the {k} nearest neighbours are the same, at least {least:.1%} expected"


def find_warnings(
    parts: Sequence[GroupAgreement], spread: float, tolerances: Tolerances, *, few: bool
) -> Iterator[str]:
    """What makes the comparison say less than it seems to; ``few``: pictures, to search neighbours among."""
    if spread <= tolerances.max_relative:
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
    if few and tolerances.min_neighbours:
        yield (
            f"too few pictures ({2 * MOST + 1} are needed) to compare nearest neighbours: not judged. "
            f"data= and samples= take more"
        )
