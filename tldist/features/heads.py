"""Linear heads fitted on features: multinomial logistic regression, swept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

DEFAULT_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
"""L2 strengths that a sweep tries, strongest first."""

H = TypeVar("H")

_MOST_ITERATIONS = 2000
_EXACT, _ROUGH = 1e-6, 1e-4
"""Largest component of the gradient, in preconditioned coordinates: of a result; of what is only compared."""


@dataclass(frozen=True)
class LinearHead:
    """A fitted head.

    Attributes:
        weight: float64 (K, D), for features as they were given.
        bias: float64 (K,).
        l2: the strength of the penalty that it was fitted with.
        converged: whether the gradient vanished.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """(N, D) of any float type to float64 (N, K)."""
        return nn.functional.linear(features.double(), self.weight, self.bias)

    def describe(self) -> dict[str, Any]:
        """As plain data, as a chain's description has it."""
        outputs, width = self.weight.shape
        return {"type": "linear", "in": width, "out": outputs}

    def tensors(self) -> dict[str, Tensor]:
        """By the names that the module has for them."""
        return {"weight": self.weight, "bias": self.bias}


@dataclass(frozen=True)
class Sweep(Generic[H]):
    """A head chosen by held-out samples, then fitted on all.

    Attributes:
        head: fitted on all samples with the choice.
        held_out_accuracy, held_out_loss: of the choice, on the held-out samples (loss in nats).
        tried: (what was tried, held-out loss) in the order tried: of logistic regression its l2.
    """

    head: H
    held_out_accuracy: float
    held_out_loss: float
    tried: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class HeldOut:
    """Samples (N, D) that choose between heads, with labels and weights."""

    features: Tensor
    labels: Tensor
    weights: Tensor

    def loss(self, logits: Tensor) -> float:
        """The weighted mean of the cross-entropies, in nats."""
        losses = nn.functional.cross_entropy(logits, self.labels, reduction="none")
        return float((losses * self._shares).sum())

    def accuracy(self, logits: Tensor) -> float:
        """The weighted share of right answers."""
        return float(((logits.argmax(1) == self.labels) * self._shares).sum())

    @property
    def _shares(self) -> Tensor:
        return self.weights.double() / self.weights.double().sum()


def fit_logistic(
    features: Tensor, labels: Tensor, num_classes: int, *, l2: float, weights: Tensor | None = None
) -> LinearHead:
    """Multinomial logistic regression by L-BFGS: full batch, float64, deterministic.

    Minimises ``mean cross-entropy + l2 / 2 * |W|^2`` (the bias is free) over features that are centred and
    divided by one number, the root of their mean variance; the result is folded back. One number for all
    dimensions keeps the penalty the same under a rotation of the features, and does not blow up dimensions
    that hardly vary on the source but may on the target. scikit-learn's ``C`` is ``1 / (l2 * N)`` there
    (``2 / (l2 * N)`` for two classes, where it keeps one row).

    Args:
        features: (N, D), any float type.
        labels: int64 (N,), 0 .. K - 1.
        num_classes: K.
        l2: strength of the penalty, > 0.
        weights: (N,) of the samples, >= 0: one of weight 2 is one that is there twice. None: all alike.
    """
    return _fit(_Rotated.of(features, weights), labels, num_classes, l2, _EXACT)


@dataclass(frozen=True)
class _Rotated:
    """Centred and scaled features in the coordinates of their principal axes.

    There the problem is nearly diagonal, so that it can be preconditioned: L-BFGS then needs a tenth of the
    steps. A rotation changes neither the loss nor the penalty.
    """

    centre: Tensor  # (D,)
    scale: float
    axes: Tensor  # (D, R), orthonormal; directions without variance are dropped: their weight is 0
    variances: Tensor  # (R,)
    coordinates: Tensor  # (N, R)
    shares: Tensor  # (N,), the weights of the samples, of sum 1

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> _Rotated:
        values = features.double()
        weights = torch.ones(len(values)) if weights is None else weights
        shares = weights.double() / weights.double().sum()
        centre = values[0] + shares @ (values - values[0])  # exact where a dimension is constant
        centred = values - centre
        scale = float((shares @ centred.square()).mean().sqrt()) or 1.0
        inputs = centred / scale
        rooted = inputs * shares.sqrt()[:, None]
        if len(inputs) < inputs.shape[1]:
            _, singular, rows = torch.linalg.svd(rooted, full_matrices=False)
            variances, axes = singular.square(), rows.T
        else:
            variances, axes = torch.linalg.eigh(rooted.T @ rooted)
        alive = variances > 1e-12 * variances.max().clamp_min(1e-300)
        axes = axes[:, alive]
        return cls(centre, scale, axes, variances[alive], inputs @ axes, shares)


def _fit(
    data: _Rotated,
    labels: Tensor,
    num_classes: int,
    l2: float,
    tolerance: float,
    start: LinearHead | None = None,
) -> LinearHead:
    """Minimise to a gradient below ``tolerance``, from another strength's solution where there is one."""
    # The Hessian along an axis is about (its variance times p (1 - p)) + l2; 0.1 stands for p (1 - p).
    steps = 1 / (0.1 * data.variances + l2).sqrt()
    inputs = data.coordinates * steps
    if start is None:
        weight = torch.zeros(num_classes, len(steps), dtype=torch.float64)
        bias = torch.zeros(num_classes, dtype=torch.float64)
    else:
        weight = start.weight @ data.axes * data.scale / steps
        bias = start.bias + start.weight @ data.centre
    weight.requires_grad_(), bias.requires_grad_()

    def objective() -> Tensor:
        losses = nn.functional.cross_entropy(
            nn.functional.linear(inputs, weight, bias), labels, reduction="none"
        )
        return data.shares @ losses + l2 / 2 * (weight * steps).square().sum()

    converged = _minimise(objective, [weight, bias], tolerance)
    plain = (weight.detach() * steps) @ data.axes.T / data.scale
    return LinearHead(plain, bias.detach() - plain @ data.centre, l2, converged)


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor], tolerance: float) -> bool:
    """Minimise in place; whether the gradient vanished."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=tolerance,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    closure()
    return all(float(p.grad.norm()) < 100 * tolerance for p in parameters if p.grad is not None)


def sweep_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    held_out: Tensor,
    *,
    grid: Sequence[float] = DEFAULT_GRID,
    weights: Tensor | None = None,
) -> Sweep[LinearHead]:
    """Choose the strength of the penalty by held-out samples, then fit on all samples.

    Goes from the strongest to the weakest penalty, each fit starting from the one before, and stops when
    the held-out loss has risen: it falls first and rises once the head fits noise.

    Args:
        features: (N, D), any float type.
        labels: int64 (N,).
        num_classes: K.
        held_out: bool (N,), which samples choose; at least one, and not all.
        grid: strengths to try.
        weights: (N,) of the samples, >= 0, in the fits and in what the held-out ones say. None: all alike.
    """
    seen, unseen = ~held_out, held_out
    weights = torch.ones(len(features)) if weights is None else weights
    judge = HeldOut(features[unseen], labels[unseen], weights[unseen])
    data = _Rotated.of(features[seen], weights[seen])
    head: LinearHead | None = None
    best: tuple[float, LinearHead] | None = None
    tried: list[tuple[float, float]] = []
    for l2 in sorted(grid, reverse=True):
        head = _fit(data, labels[seen], num_classes, l2, _ROUGH, head)
        loss = judge.loss(head.logits(judge.features))
        tried.append((l2, loss))
        if best is not None and loss >= best[0]:
            break
        best = (loss, head)
    assert best is not None
    loss, chosen = best
    accuracy = judge.accuracy(chosen.logits(judge.features))
    final = _fit(_Rotated.of(features, weights), labels, num_classes, chosen.l2, _EXACT, chosen)
    return Sweep(final, accuracy, loss, tuple(tried))
