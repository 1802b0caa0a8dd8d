"""Weights of source samples, so that in the weighted mean they look like the target: kmm, density."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import cholesky, solve_triangular
from scipy.optimize import brentq, lsq_linear, nnls
from torch import Tensor

from tldist.align.fit import Data, two_samples
from tldist.errors import DomainError
from tldist.features.heads import fit_logistic
from tldist.features.moments import Moments
from tldist.models.transforms import Kernel

_ROWS = 4096
_JITTER = 1e-10
"""Added to the kernel's diagonal of ones: it is singular to rounding where samples are near each other."""


def kmm(
    source: Data,
    target: Data,
    *,
    gamma: float | None = None,
    most: float = 1000.0,
    slack: float | None = None,
    block: int = 1000,
) -> Tensor:
    """Weights under which the source has the target's mean in the space of a Gaussian kernel.

    Kernel mean matching, eq. 12 of Huang et al. (NIPS 2006): the quadratic programme
    ``min w K w / 2 - kappa w`` with ``0 <= w <= most`` and ``|sum w - N| <= N slack``, solved exactly as a
    non-negative least-squares problem. ADAPT's and SKADA's ``B`` is ``most``, their ``eps`` is ``slack``.
    Of more than ``block`` source samples, every so-manieth forms a problem of its own, each with all of the
    target (ADAPT's ``max_size`` does so with random parts).

    Args:
        source, target: features (N, D).
        gamma: of the kernel ``exp(-gamma |x - y|^2)``; None: 1 / the mean squared distance of two samples.
        most: B, of one weight.
        slack: epsilon; None: ``(sqrt(N) - 1) / sqrt(N)``, as the authors advise.
        block: samples of one quadratic programme.

    Returns:
        float64 (N_S,), about 1 in the mean.
    """
    first, second = two_samples(source, target)
    if gamma is None:
        gamma = 1 / (2 * float(Moments.from_batch(torch.cat([first, second])).variance.sum()) or 1.0)
    parts = -(-len(first) // block)
    weights = torch.empty(len(first), dtype=torch.float64)
    for start in range(parts):
        points = first[start::parts]
        kernel = Kernel.of(points, gamma)
        sums = torch.stack([kernel.values(rows).sum(0) for rows in second.split(_ROWS)]).sum(0)
        size = len(points)
        loose = (size**0.5 - 1) / size**0.5 if slack is None else slack
        found = solve_kmm(
            kernel.values(points).numpy(), (sums * size / len(second)).numpy(), most, loose * size
        )
        weights[start::parts] = torch.from_numpy(found)
    return weights


def solve_kmm(kernel: np.ndarray, kappa: np.ndarray, most: float, slack: float) -> np.ndarray:
    """The quadratic programme of `kmm`.

    ``K = R^T R`` makes it least squares, ``|R w - R^-T kappa|^2``. Where the bound on the sum holds, its
    multiplier nu adds to kappa: the sum grows with nu, so that one root is sought.

    Args:
        kernel: K (N, N).
        kappa: (N,).
        most: of a weight.
        slack: of the sum of weights against N.
    """
    count = len(kernel)
    factor = cholesky(kernel + _JITTER * np.eye(count))

    def solve(nu: float) -> np.ndarray:
        wanted = solve_triangular(factor, kappa + nu, trans=1)
        found: np.ndarray = nnls(factor, wanted, maxiter=100 * count)[0]
        if found.max() > most:
            found = lsq_linear(factor, wanted, (0, most), tol=1e-14, lsq_solver="exact").x
        return found

    free = solve(0.0)
    bound = float(np.clip(free.sum(), count - slack, count + slack))
    if abs(free.sum() - bound) <= 1e-12 * count:
        return free
    return solve(_root(lambda nu: float(solve(nu).sum()) - bound, bound > free.sum()))


def _root(excess: Callable[[float], float], above: bool) -> float:
    """The root of a growing function of nu, which lies above 0 or below."""
    far = 1.0 if above else -1.0
    for _ in range(60):
        if (excess(far) > 0) == above:
            break
        far *= 2
    else:
        raise DomainError(
            "kmm: the bounds on single weights leave no sum in its bounds; raise most or slack."
        )
    root: float = brentq(excess, min(0.0, far), max(0.0, far), xtol=1e-14, rtol=1e-14)
    return root


def density_ratio(source: Data, target: Data, *, l2: float = 1e-2) -> Tensor:
    """Weights by how much likelier a sample is in the target, as a logistic regression tells them apart.

    ``p_T(x) / p_S(x)`` is the odds of the target where both domains weigh the same (Bickel et al., JMLR
    2009); divided by their mean.

    Args:
        source, target: features (N, D).
        l2: of the regression (`tldist.features.heads.fit_logistic`): the stronger, the more even weights.

    Returns:
        float64 (N_S,), 1 in the mean.
    """
    first, second = two_samples(source, target)
    labels = torch.cat([torch.zeros(len(first)), torch.ones(len(second))]).long()
    balance = torch.cat([torch.full((len(x),), 1 / len(x)).double() for x in (first, second)])
    head = fit_logistic(torch.cat([first, second]), labels, 2, l2=l2, weights=balance)
    logits = head.logits(first)
    odds = (logits[:, 1] - logits[:, 0]).clamp(-30, 30).exp()
    return odds / odds.mean()


WEIGHTS: dict[str, Callable[[Data, Data], Tensor]] = {"kmm": kmm, "density": density_ratio}
"""The family of instance weights, by the name that ``weights=`` takes."""
