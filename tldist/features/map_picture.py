"""The two-dimensional map of two domains: their features on a plane, coloured by class, marked by domain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tldist.errors import needs
from tldist.features.arrays import Values, as_features, check_widths, choose_rows
from tldist.features.maps import principal
from tldist.features.moments import Moments
from tldist.methods import find_method

MOST = 1000
"""Points of each domain that are drawn."""
_TSNE_WIDTH = 50
"""Principal components that t-SNE reads."""


@dataclass(frozen=True)
class Projected:
    """Two domains on one plane.

    Attributes:
        source, target: float64 (n, 2) and (m, 2).
        source_rows, target_rows: int64, the rows of the features that they are of.
        share: of the variance that the plane holds; None: the projection is not linear.
    """

    source: np.ndarray
    target: np.ndarray
    source_rows: np.ndarray
    target_rows: np.ndarray
    share: float | None


def pca(points: Tensor, seed: int) -> tuple[Tensor, float | None]:
    """The first two principal components of points (N, D), and their share of the variance."""
    del seed
    moments = Moments.from_batch(points)
    plane = principal(moments, min(2, moments.width))(points)
    if plane.shape[1] < 2:
        plane = torch.cat([plane, torch.zeros_like(plane)], dim=1)
    total = float(moments.variance.sum())
    return plane, float(plane.var(0).sum()) / total if total else 1.0


def tsne(points: Tensor, seed: int) -> tuple[Tensor, float | None]:
    """t-SNE by scikit-learn, of the first 50 principal components, starting from the first two.

    Distances between clusters mean little; whether two domains mix within a class can be seen.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    with needs("demo"):
        from sklearn.manifold import TSNE
    moments = Moments.from_batch(points)
    few = principal(moments, min(_TSNE_WIDTH, moments.width))(points).numpy()
    width = min(30.0, (len(points) - 1) / 3)
    start = "pca" if few.shape[1] > 1 else "random"
    found = TSNE(perplexity=width, init=start, random_state=seed).fit_transform(few)
    return torch.from_numpy(np.asarray(found, dtype=np.float64)), None


PROJECTIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, float | None]]] = {"pca": pca, "tsne": tsne}
"""The projections to a plane, by name."""


def project(
    source: Values, target: Values, *, method: str = "pca", most: int = MOST, seed: int = 0
) -> Projected:
    """Put features of two domains on one plane; both weigh the same where both have many rows.

    Args:
        source, target: (N, D) and (M, D).
        method: a key of `PROJECTIONS`, or ``package.module:function``.
        most: rows of each domain that are taken, drawn by ``seed``.
        seed: of the rows and of the projection's start.

    Raises:
        DomainError: other widths, or a single row.
    """
    first = as_features(source, "the source's features", at_least=2).cpu()
    second = as_features(target, "the target's features", at_least=2).cpu()
    check_widths(first.shape[1], second.shape[1])
    rows = [choose_rows(len(part), most, seed) for part in (first, second)]
    points = torch.cat([first[rows[0]], second[rows[1]]])
    plane, share = find_method(method, PROJECTIONS)(points, seed)
    cut = len(rows[0])
    return Projected(plane[:cut].numpy(), plane[cut:].numpy(), rows[0].numpy(), rows[1].numpy(), share)


def draw_domains(
    projected: Projected,
    source_classes: Sequence[str],
    target_classes: Sequence[str] | None = None,
    names: tuple[str, str] = ("source", "target"),
) -> str:
    """The picture of two domains as inline SVG: the colour is the class, the marker is the domain.

    Args:
        projected: of `project`.
        source_classes, target_classes: the class name of each row of the features that were projected (not
            only of those drawn); no target classes: the target has a colour of its own. Predicted classes
            do as well as labels.
        names: of the domains.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with needs("report"):
        from tldist import pictures

    labels = [source_classes[row] for row in projected.source_rows]
    labels += [names[1] if target_classes is None else target_classes[row] for row in projected.target_rows]
    kinds = [names[0]] * len(projected.source) + [names[1]] * len(projected.target)
    return pictures.plane(np.concatenate([projected.source, projected.target]), labels, kinds)
