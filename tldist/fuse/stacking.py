"""Stacking: the shares of an ensemble's members, fitted on labelled images that they have not learned from.

Axes: N images of this process, M members, K classes of the ensemble.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tldist.bundle import BundleConfig, Task
from tldist.data.loader import load_batches
from tldist.data.order import blocks_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError, ModelError
from tldist.fuse.outputs import member_shares
from tldist.models.composite import NO_VOTE, Ensemble, combine_votes
from tldist.models.load import input_tensor
from tldist.progress import progress_bar
from tldist.training.ledger import Ledger
from tldist.training.measure import why_not_measurable

Each = Literal["member", "class"]
"""One weight a member, or one for each member and class."""

_MOST_ITERATIONS = 500
_GRADIENT = 1e-7
_CHUNK = 1 << 22
"""Votes that are looked at at once: 32 MB in float64."""


@dataclass(frozen=True)
class Stacking:
    """Fitted shares.

    Attributes:
        weights: float64 (M,) of sum 1, or (M, K) of sum 1 over the members that know a class.
        loss: mean cross-entropy on the images of the fit, in nats.
        uniform_loss: the same with equal shares.
        images: how many they were.
        converged: whether the gradient vanished.
    """

    weights: Tensor
    loss: float
    uniform_loss: float
    images: int
    converged: bool

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        names = ("loss", "uniform_loss", "images", "converged")
        return {**{name: getattr(self, name) for name in names}, "weights": self.weights.tolist()}


def fit_stacking(
    ensemble: Ensemble,
    config: BundleConfig,
    domain: Domain,
    team: Team,
    *,
    each: Each = "member",
    prior: float = 1.0,
    batch_size: int = 64,
    workers: int = 0,
    ledger: Ledger | None = None,
) -> Stacking:
    """Fit the shares of an ensemble's members and put them into it; called by all processes together.

    The linear pool of predictive distributions with the log score: Yao, Vehtari, Simpson and Gelman,
    arXiv:1704.02030, eq. 4: shares on the simplex that maximise the mean log probability of the labels. One
    weight a member, where all know all classes, is a convex problem. Otherwise (a weight for each class, or
    classes that some do not know) the pool is divided by its sum over the classes, and the result is a local
    optimum that is reached from equal shares and so never worse than those. In both, a Dirichlet prior of
    ``prior`` images for each member keeps shares off 0. By L-BFGS in float64 over the logarithms of the
    weights; the sums over images go over all processes.

    Args:
        ensemble: of ``combine=stacking``, on the team's device; changed in place.
        config: its configuration.
        domain: labelled images that the members have not learned from, of classes that they know.
        team: the processes.
        each: one weight a member, or one for each member and class.
        prior: in images; 0: none.
        batch_size: images that one process handles at once.
        workers: decoding processes.
        ledger: takes the broken images.

    Raises:
        DomainError: no labels, another task, unknown classes, or too many broken images.
        ModelError: an output is not finite.
    """
    assert ensemble.combine != "logits", "the fit is of pooled probabilities"
    reason = why_not_measurable(domain, config.classes, config.task)
    if reason:
        raise DomainError(f"{domain.name}: stacking cannot be fitted on it: {reason}.")
    votes, labels = collect_votes(
        ensemble, config, domain, team, batch_size=batch_size, workers=workers, ledger=ledger
    )
    found = _Problem(votes, labels, ensemble.known.cpu(), config.task, team, each, prior).solve()
    ensemble.shares = member_shares(found.weights, ensemble.known, config.classes)
    return found


def collect_votes(
    ensemble: Ensemble,
    config: BundleConfig,
    domain: Domain,
    team: Team,
    *,
    batch_size: int = 64,
    workers: int = 0,
    ledger: Ledger | None = None,
) -> tuple[Tensor, Tensor]:
    """This process's share of the members' votes: float32 (N, M, K), and labels (N,) or (N, K), on the CPU.

    Each member's network runs once for every image. Arguments as in `fit_stacking`.
    """
    ledger = ledger or Ledger(domain, None)
    plans = blocks_of(len(domain), batch_size, team.rank, team.size)
    how, votes, labels = config.preprocessing, [], []
    ensemble.eval()
    with torch.no_grad(), progress_bar(len(domain), "img", "votes", keep=False) as bar:
        for batch in load_batches(domain, plans, how, classes=config.classes, workers=workers):
            ledger.add(batch.broken)
            found = ensemble.scaled_votes(input_tensor(batch.images.to(team.device), how))
            votes.append(found.float().cpu()[batch.valid])
            labels.append(batch.labels[batch.valid])
            bar.update(len(batch.indices) * team.size)
    ledger.settle(team)
    if not votes:
        tags = (0, len(config.classes)) if domain.is_multilabel else (0,)
        return torch.zeros(0, *ensemble.known.shape), torch.zeros(tags, dtype=torch.int64)
    return torch.cat(votes), torch.cat(labels)


class _Problem:
    """The mean loss of the pool as a function of the logarithms of the weights, over all processes."""

    def __init__(
        self, votes: Tensor, labels: Tensor, known: Tensor, task: Task, team: Team, each: Each, prior: float
    ) -> None:
        if team.any(not bool(torch.isfinite(votes).all())):
            raise ModelError(
                "the votes of a member are not finite (NaN or infinity): its weights are broken."
            )
        self.votes, self.labels, self.known, self.task, self.team = votes, labels, known, task, team
        self.images = int(self._sum(torch.tensor([len(votes)], dtype=torch.float64)))
        if not self.images:
            raise DomainError("stacking: no image could be decoded.")
        self.prior = prior / self.images
        columns = known.shape[1] if each == "class" else 1
        self.theta = torch.zeros(len(known), columns, dtype=torch.float64, requires_grad=True)

    def solve(self) -> Stacking:
        """Minimise from equal weights; the same result on every process."""
        uniform = self._mean_loss()[0]
        converged = _minimise(self.theta, self._objective)
        loss = self._mean_loss()[0]
        weights = self.team.on_main(lambda: self._log_weights().detach().exp())
        weights = weights[:, 0] if weights.shape[1] == 1 else weights
        return Stacking(weights, loss, uniform, self.images, converged)

    def _objective(self) -> tuple[float, Tensor]:
        """Loss and prior, and their gradient in theta."""
        loss, gradient = self._mean_loss()
        logs = self._log_weights()
        negative = -self.prior * logs[torch.isfinite(logs)].sum()
        (slope,) = torch.autograd.grad(negative, self.theta)
        return loss + float(negative.detach()), gradient + slope

    def _mean_loss(self) -> tuple[float, Tensor]:
        """The mean cross-entropy of all images and its gradient in theta: float64 (M, 1) or (M, K)."""
        total = torch.zeros(1 + self.theta.numel(), dtype=torch.float64)
        rows = max(1, _CHUNK // self.known.numel())
        for votes, labels in zip(self.votes.split(rows), self.labels.split(rows)):
            loss = self._loss_of(votes.double(), labels)
            (slope,) = torch.autograd.grad(loss, self.theta)
            total += torch.cat([loss.detach()[None], slope.flatten()])
        mean = self._sum(total) / self.images
        return float(mean[0]), mean[1:].view_as(self.theta)

    def _loss_of(self, votes: Tensor, labels: Tensor) -> Tensor:
        """The sum of the losses of some images."""
        logs = _among_knowing(self._log_weights(), self.known)
        pooled = combine_votes(votes, logs.masked_fill(~self.known, NO_VOTE), self.task)
        if self.task == "multilabel":
            losses = nn.functional.binary_cross_entropy_with_logits(pooled, labels.double(), reduction="none")
            return losses.mean(1).sum()
        return nn.functional.cross_entropy(pooled, labels, reduction="sum")

    def _log_weights(self) -> Tensor:
        """float64 (M, 1), sum 1 over all members; or (M, K), sum 1 over those that know the class."""
        if self.theta.shape[1] == 1:
            return self.theta.log_softmax(0)
        return _among_knowing(self.theta, self.known)

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.team.sum(tensor.to(self.team.device)).cpu()


def _among_knowing(logs: Tensor, known: Tensor) -> Tensor:
    """Log weights (M, 1) or (M, K) of sum 1 over the members that know a class: (M, K); -inf for the rest."""
    return logs.expand(known.shape).masked_fill(~known, -torch.inf).log_softmax(0)


def _minimise(theta: Tensor, objective: Callable[[], tuple[float, Tensor]]) -> bool:
    """Minimise in place; whether the gradient vanished."""
    optimizer = torch.optim.LBFGS(
        [theta],
        max_iter=_MOST_ITERATIONS,
        tolerance_grad=_GRADIENT,
        tolerance_change=1e-15,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        loss, theta.grad = objective()
        return loss

    optimizer.step(closure)
    return float(objective()[1].abs().max()) < 100 * _GRADIENT
