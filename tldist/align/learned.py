"""An alignment that is learned: mlp, a small non-linear map under which both domains look alike."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tldist.align.fit import Data, Fit, Labels, check_dims, known_labels, source_labels_of, two_samples
from tldist.errors import ModelError, RecipeError
from tldist.features.maps import principal
from tldist.features.moments import Moments
from tldist.models.transforms import Affine, Mlp

_DIMS = 64
_BATCH = 256
_LEARNING_RATE = 1e-3
_WIDEST, _KERNELS = 4.0, 5
"""Gaussian kernels of 4, 2, 1, 1/2 and 1/4 of the mean squared distance, as DAN has several."""


def mlp(
    source: Data,
    target: Data,
    source_labels: Labels,
    target_labels: Labels | None = None,
    *,
    dims: int | None = None,
    kind: str = "mmd",
    strength: float = 10.0,
    hidden: int = 256,
    iterations: int = 500,
    seed: int = 0,
) -> Fit:
    """One map for both domains: principal components, and what a hidden layer adds to them.

    Learned so that a linear head tells the source's classes apart and the domains' distributions are near:
    the loss is the cross-entropy (with the target samples whose labels are given) plus ``strength`` times a
    distance of the domains. The hidden layer adds nothing at first, so that it starts from `pca`. Adam on
    batches of 256 of each domain; the numbers depend on ``seed`` alone.

    Args:
        source, target: features (N, D).
        source_labels: classes (N_S,), all known.
        target_labels: (N_T,), -1 where unknown; None: none is known.
        dims: of the common space; None: 64.
        kind: of the distance: ``mmd`` (several Gaussian kernels, as arXiv:1502.02791) or ``coral``
            (covariances, as arXiv:1607.01719, and means besides).
        strength: of the distance against the cross-entropy.
        hidden: units.
        iterations: steps.
        seed: of first weights and batches.
    """
    if kind not in DISTANCES:
        raise RecipeError(f"kind={kind}: mlp has {' and '.join(DISTANCES)}.")
    first, second = two_samples(source, target)
    labels = source_labels_of(source_labels, len(first))
    known = known_labels(target_labels, len(second), "target")
    generator = torch.Generator().manual_seed(seed)
    start = _start(first, second, dims)
    net = _Net(start, hidden, int(max(labels.max(), known.max())) + 1, generator)
    inputs = tuple(start.transform(x) for x in (first, second))
    _train(net, inputs, (labels, known), DISTANCES[kind], strength, iterations, generator)
    transform = net.transform(start)
    return Fit(transform, transform, {"dims": len(start.weight), "kind": kind})


def moment_distance(source: Tensor, target: Tensor) -> Tensor:
    """The squared distances of means and of covariances of (N, D), over D: 0 for the same two moments."""
    apart = source.mean(0) - target.mean(0)
    covariances = source.T.cov() - target.T.cov()
    return (apart.square().sum() + covariances.square().sum()) / source.shape[1]


def kernel_distance(source: Tensor, target: Tensor) -> Tensor:
    """The squared maximum mean discrepancy (biased) under a mean of Gaussian kernels of several widths."""
    both = torch.cat([source, target])
    lengths = both.square().sum(1)
    squares = (lengths[:, None] + lengths - 2 * both @ both.T).clamp_min(0)
    unit = squares.detach().mean().clamp_min(1e-300)
    # One exponential: each kernel is the square of the one before, as their widths halve.
    kernels = [(-squares / (_WIDEST * unit)).exp()]
    for _ in range(_KERNELS - 1):
        kernels.append(kernels[-1].square())
    kernel = torch.stack(kernels).mean(0)
    share = torch.cat([source.new_full((len(x),), sign / len(x)) for x, sign in ((source, 1), (target, -1))])
    return share @ kernel @ share


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"coral": moment_distance, "mmd": kernel_distance}
"""What can bring the domains together, by the name that ``kind=`` takes."""


class _Net(nn.Module):
    """The hidden layer on the components, and the head that is thrown away."""

    def __init__(self, start: Affine, hidden: int, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(start.weight)

        def noise(rows: int, columns: int) -> nn.Parameter:
            values = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
            return nn.Parameter(values * (2 / columns) ** 0.5)

        self.inner = noise(hidden, width)
        self.inner_bias = nn.Parameter(torch.zeros(hidden, dtype=torch.float64))
        self.outer = nn.Parameter(torch.zeros(width, hidden, dtype=torch.float64))
        self.head = nn.Linear(width, num_classes).double()
        nn.init.zeros_(self.head.weight), nn.init.zeros_(self.head.bias)

    def forward(self, components: Tensor) -> Tensor:
        hidden = nn.functional.linear(components, self.inner, self.inner_bias).relu()
        return components + hidden @ self.outer.T

    @torch.no_grad()
    def transform(self, start: Affine) -> Mlp:
        """The map of features, the components' map folded into the hidden layer."""
        width, inputs = start.weight.shape
        whole = Mlp(inputs, len(self.inner), width).double()
        whole.weight, whole.bias = start.weight, start.bias
        whole.inner = self.inner @ start.weight
        whole.inner_bias = self.inner_bias + self.inner @ start.bias
        whole.outer = self.outer.detach().clone()
        return whole


def _start(first: Tensor, second: Tensor, dims: int | None) -> Affine:
    """The first principal components of all samples, divided by one number: their mean variance is 1."""
    both = Moments.from_batch(torch.cat([first, second]))
    most = min(both.width, both.count - 1)
    axes = principal(both, min(_DIMS, most) if dims is None else check_dims(dims, most))
    spread = float(((axes.weight @ both.covariance) * axes.weight).sum(1).mean().sqrt()) or 1.0
    return Affine.of(axes.weight / spread, axes.bias / spread)


def _train(
    net: _Net,
    inputs: tuple[Tensor, ...],
    labels: tuple[Tensor, Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    strength: float,
    iterations: int,
    generator: torch.Generator,
) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=_LEARNING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, iterations))
    for _ in range(iterations):
        chosen = [torch.randperm(len(x), generator=generator)[:_BATCH] for x in inputs]
        found = [net(x[rows]) for x, rows in zip(inputs, chosen)]
        answers = torch.cat([known[rows] for known, rows in zip(labels, chosen)])
        told = answers >= 0
        loss = nn.functional.cross_entropy(net.head(torch.cat(found)[told]), answers[told])
        loss = loss + strength * distance(found[0], found[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    if not all(bool(torch.isfinite(parameter).all()) for parameter in net.parameters()):
        raise ModelError(f"mlp: the map became NaN or infinite (strength={strength}); give a smaller one.")
