"""All measures of the distance between two domains at once, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from tldist.features.arrays import Values, as_features, choose_rows
from tldist.features.measures.gaussian import coral_distance, frechet_distance, pooled_scale, rescaled
from tldist.features.measures.mmd import linear_mmd, several_bandwidths, squared_mmd
from tldist.features.measures.separation import proxy_a_distance
from tldist.features.moments import Moments

MOST = 2000
"""Rows of each domain that the measures in quadratic time and the classifier see."""


@dataclass(frozen=True)
class Measures:
    """How far two domains are from each other; none has a unit, 0 is nearest.

    Attributes:
        source_count, target_count: images.
        mmd: squared MMD with five Gaussian kernels around the median distance, unbiased.
        mmd_linear, mmd_linear_error: the same in linear time, over all rows given, and its standard error.
        a_distance: proxy A-distance, at most 2.
        coral: squared distance of the covariances (Deep CORAL, eq. 1).
        frechet: squared Frechet distance of the Gaussians.

    ``coral`` and ``frechet`` are of features divided by the root of the mean variance of both domains
    together: a map that shrinks all features alike brings nothing nearer.
    """

    source_count: int
    target_count: int
    mmd: float
    mmd_linear: float
    mmd_linear_error: float
    a_distance: float
    coral: float
    frechet: float

    def to_dict(self) -> dict[str, float]:
        """As plain data; an error that is not known (one pair) is None."""
        values = asdict(self)
        if self.mmd_linear_error == float("inf"):
            values["mmd_linear_error"] = None
        return values


def measure_domains(
    source: Values,
    target: Values,
    *,
    moments: tuple[Moments, Moments] | None = None,
    most: int = MOST,
    seed: int = 0,
) -> Measures:
    """Measure the distance between two domains.

    Args:
        source, target: (N, D) and (M, D): all features, or a sample of them.
        moments: of all features of source and target, where a sample is given; None: of those given.
        most: rows of each that the MMD in quadratic time and the classifier see, drawn by ``seed``.
        seed: of what is drawn.

    Raises:
        DomainError: fewer than five rows, other widths, or numbers that are not finite.
    """
    first = as_features(source, "the source's features", at_least=5)
    second = as_features(target, "the target's features", at_least=5)
    of_source, of_target = moments or (Moments.from_batch(first), Moments.from_batch(second))
    scale = pooled_scale(of_source, of_target)
    scaled = rescaled(of_source, scale), rescaled(of_target, scale)
    few = tuple(a[choose_rows(len(a), most, seed).to(a.device)] for a in (first, second))
    bandwidths = several_bandwidths(first, second)
    linear = linear_mmd(first, second, bandwidths, seed=seed)
    return Measures(
        source_count=of_source.count,
        target_count=of_target.count,
        mmd=squared_mmd(few[0], few[1], bandwidths),
        mmd_linear=linear.value,
        mmd_linear_error=linear.error,
        a_distance=proxy_a_distance(few[0], few[1], seed=seed, most=most),
        coral=coral_distance(*scaled),
        frechet=frechet_distance(*scaled),
    )
