"""Alignments by components that tell the domains least apart and samples most: tca, jda."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.linalg import eigh
from torch import Tensor

from tldist.align.fit import (
    Data,
    Fit,
    Labels,
    check_dims,
    known_labels,
    source_labels_of,
    two_moments,
    two_samples,
)
from tldist.errors import RecipeError
from tldist.features.maps import turned
from tldist.features.moments import Moments, moments_of
from tldist.models.transforms import Affine, Kernel, Transform

_ROWS = 4096
"""Samples whose kernel values are held at once."""
_DIMS = 64
"""Components where no number is given, if there are as many."""


def tca(
    source: Moments | Data,
    target: Moments | Data,
    *,
    dims: int | None = None,
    kind: str = "rbf",
    ridge: float = 0.1,
    mu: float | None = None,
    gamma: float | None = None,
    landmarks: int = 1000,
    seed: int = 0,
) -> Fit:
    """Components in which the means of both domains meet while the samples' variance stays.

    Transfer component analysis, eq. 11 of Pan et al. (IEEE TNN 2011): the first eigenvectors of
    ``(K L K + mu I)^(-1) K H K``, of unit length. The weights are put on ``landmarks`` in the place of all
    samples: the problem is then one of means and covariances of the kernel's values, at any number of
    samples, and the paper's own where the landmarks are all samples. The same map takes new samples of both
    domains; its outputs have the mean 0 over all samples.

    ``kind=linear`` puts the weights on the features themselves (the "primal" form) and so reads moments
    alone. ``mu`` in other libraries: ADAPT's and SKADA's is ``1 / mu`` here, and they take eigenvectors of
    a matrix that is not symmetric as if it were; J. Wang's toolbox has ``lamb = mu / (1 / N_S + 1 / N_T)``
    and samples of unit length.

    Args:
        source, target: features (N, D); or, for linear, their moments.
        dims: components; None: 64.
        kind: ``rbf`` or ``linear``.
        ridge: ``mu`` as a multiple of the mean variance of what the weights are put on.
        mu: the paper's, absolute; None: by ``ridge``.
        gamma: of the kernel ``exp(-gamma |x - y|^2)``; None: 1 / the mean squared distance of two samples.
        landmarks: at most so many, half of each domain, chosen by ``seed``.
        seed: of that choice.
    """
    lifted = _lift(source, target, kind, gamma, landmarks, seed)
    both = lifted.source.merge(lifted.target)
    difference = lifted.source.mean - lifted.target.mean
    if mu is None:
        mu = ridge * float(both.variance.mean())
    weights = _components(both, torch.outer(difference, difference), mu, _kept(dims, both))
    transform = lifted.map(weights, both.mean)
    return Fit(transform, transform, {"dims": len(weights), "mu": mu, "gamma": lifted.gamma})


def jda(
    source: Data,
    target: Data,
    source_labels: Labels,
    target_labels: Labels | None = None,
    *,
    dims: int | None = None,
    kind: str = "linear",
    ridge: float = 10.0,
    mu: float | None = None,
    gamma: float | None = None,
    iterations: int = 10,
    landmarks: int = 1000,
    seed: int = 0,
) -> Fit:
    """As tca, and in each class the means meet too, for which the target's classes are guessed in turns.

    Joint distribution adaptation, algorithm 1 of Long et al. (ICCV 2013): the matrices of all domains' and
    classes' means are summed and divided by their Frobenius norm, as the authors' code does. A target
    sample's class is that of the source sample of the largest cosine in the components, uncentred (theirs is
    the nearest of samples of unit length, the same). A class that no target sample is thought to have adds
    nothing. It stops when no guess changes.

    Args:
        source, target: features (N, D).
        source_labels: classes (N_S,), all known.
        target_labels: (N_T,), -1 where unknown; a known class is not guessed. None: none is known.
        dims: components; None: 64.
        kind: ``linear`` (the weights on features) or ``rbf`` (on landmarks).
        ridge: lambda as a multiple of the mean variance of what the weights are put on.
        mu: the paper's lambda, absolute; None: by ``ridge``.
        gamma, landmarks, seed: as in `tca`.
        iterations: rounds at most; the first guesses no class.
    """
    first, second = two_samples(source, target)
    labels = source_labels_of(source_labels, len(first))
    known = known_labels(target_labels, len(second), "target")
    lifted = _lift(first, second, kind, gamma, landmarks, seed)
    both = lifted.source.merge(lifted.target)
    kept = _kept(dims, both)
    if mu is None:
        mu = ridge * float(both.variance.mean())
    guessed = torch.full_like(known, -1)  # in the first round no class is matched
    changed: list[int] = []
    for _ in range(iterations):
        apart = _joint_difference(lifted, labels, first, second, guessed)
        weights = _components(both, apart, mu, kept)
        uncentred = lifted.map(weights, None)
        found = _nearest_labels(uncentred.transform(first), labels, uncentred.transform(second))
        found = torch.where(known >= 0, known, found)
        changed.append(int((found != guessed).sum()))
        if changed[-1] == 0:
            break
        guessed = found
    transform = lifted.map(weights, both.mean)
    return Fit(transform, transform, {"dims": kept, "changed": changed, "mu": mu, "gamma": lifted.gamma})


@dataclass(frozen=True)
class _Lifted:
    """Both domains as the vectors that weights are put on: the features, or the kernel's values."""

    source: Moments
    target: Moments
    kernel: Kernel | None
    gamma: float | None

    def map(self, weights: Tensor, mean: Tensor | None) -> Transform:
        """The map to components of weights (d, M); centred on a mean (M,) if one is given."""
        bias = torch.zeros(len(weights)).double() if mean is None else -weights @ mean
        if self.kernel is None:
            return Affine.of(weights, bias)
        points = self.kernel.landmarks / self.kernel.scale + self.kernel.centre
        kernel = Kernel.of(points, float(self.kernel.scale) ** 2, weights)
        kernel.bias = bias
        return kernel

    def mean_of(self, features: Tensor) -> Tensor:
        """The mean (M,) of the lifted vectors of features (N, D)."""
        if self.kernel is None:
            return features.mean(0)
        sums = torch.stack([self.kernel.values(part).sum(0) for part in features.split(_ROWS)])
        return sums.sum(0) / len(features)


def _lift(
    source: Moments | Data,
    target: Moments | Data,
    kind: str,
    gamma: float | None,
    landmarks: int,
    seed: int,
) -> _Lifted:
    if kind == "linear":
        return _Lifted(*two_moments(source, target), None, None)
    if kind != "rbf":
        raise RecipeError(f"kind={kind}: the kernels are rbf and linear.")
    if isinstance(source, Moments) or isinstance(target, Moments):
        raise RecipeError("kind=rbf reads samples; kind=linear does with moments.")
    first, second = two_samples(source, target)
    if gamma is None:
        both = Moments.from_batch(torch.cat([first, second]))
        gamma = 1 / (2 * float(both.variance.sum()) or 1.0)
    points = choose_landmarks(first, second, landmarks, seed)
    kernel = Kernel.of(points, gamma)
    found = [moments_of(kernel.values(part) for part in x.split(_ROWS)) for x in (first, second)]
    assert found[0] is not None
    assert found[1] is not None
    return _Lifted(found[0], found[1], kernel, gamma)


def choose_landmarks(source: Tensor, target: Tensor, count: int, seed: int) -> Tensor:
    """All samples, source first, if they are at most ``count``; else as many of each as can be alike."""
    if len(source) + len(target) <= count:
        return torch.cat([source, target])
    half = min(len(source), max(count // 2, count - len(target)))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for values, number in ((source, half), (target, count - half)):
        chosen.append(values[torch.randperm(len(values), generator=generator)[:number].sort().values])
    return torch.cat(chosen)


def _kept(dims: int | None, both: Moments) -> int:
    most = min(both.width, both.count - 1)
    return min(_DIMS, most) if dims is None else check_dims(dims, most)


def _components(both: Moments, apart: Tensor, mu: float, dims: int) -> Tensor:
    """Weights (d, M) of unit length: the first eigenvectors of ``(apart + mu I)^(-1) scatter``."""
    if mu <= 0:
        raise RecipeError("the regularisation (ridge, mu) is above 0: without it the weights are not unique.")
    width = both.width
    constraint = apart + mu * torch.eye(width, dtype=torch.float64)
    scatter = both.scatter / float(both.scatter.diagonal().sum() or 1.0)  # for its digits alone
    _, vectors = eigh(scatter.numpy(), constraint.numpy(), subset_by_index=(width - dims, width - 1))
    weights = torch.from_numpy(vectors).T.flip(0)
    return turned(weights / weights.norm(dim=1, keepdim=True))


def _joint_difference(
    lifted: _Lifted, labels: Tensor, first: Tensor, second: Tensor, guessed: Tensor
) -> Tensor:
    """(M, M): the outer products of the differences of means, of all samples and in each class, over the
    Frobenius norm of the matrix M of the paper (eq. 5 and 6, N by N), of which they are the image."""
    classes = labels.unique()
    differences = [(lifted.source.mean - lifted.target.mean) * len(classes) ** 0.5]
    whole, shares = 1 / len(first) + 1 / len(second), []
    for label in classes.tolist():
        here, there = labels == label, guessed == label
        if there.any():
            differences.append(lifted.mean_of(first[here]) - lifted.mean_of(second[there]))
            shares.append(1 / int(here.sum()) + 1 / int(there.sum()))
    stacked = torch.stack(differences)
    return stacked.T @ stacked / _frobenius(len(classes), whole, shares)


def _frobenius(num_classes: int, whole: float, shares: Sequence[float]) -> float:
    """The norm of ``C e_0 e_0^T + sum_c e_c e_c^T``, where e is 1 / n on n source samples and - 1 / n on n
    target samples: ``e_0 . e_0 = e_0 . e_c = 1 / N_S + 1 / N_T``, and those of two classes are orthogonal."""
    crossed = 2 * num_classes * whole**2 * len(shares)
    return float(((num_classes * whole) ** 2 + crossed + sum(share**2 for share in shares)) ** 0.5)


def _nearest_labels(source: Tensor, labels: Tensor, target: Tensor) -> Tensor:
    """The class of the source sample of the largest cosine, for each target sample."""
    unit = torch.nn.functional.normalize(source, dim=1)
    parts = [labels[(part @ unit.T).argmax(1)] for part in target.split(_ROWS)]
    return torch.cat(parts)
