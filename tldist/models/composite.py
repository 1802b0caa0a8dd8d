"""Composites: several models of any architectures that answer as one, by votes or by joined features.

Axes: N images, M members, K classes of the composite, D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tldist.bundle import Task
from tldist.errors import BundleError
from tldist.models.chain import Transform, build_transform
from tldist.models.composite_layout import Combine, ConcatLayout, EnsembleLayout
from tldist.models.heads import Several, find_head, head_width, num_logits, pool, replace_module
from tldist.models.view import View

NO_VOTE = -1e4
"""The log of no share at all: its exponential is 0 in every float format, and fp16 holds it."""


class Voter(nn.Module):
    """A member of an ensemble.

    Args:
        view: from the ensemble's input to the member's.
        model: normalised images to logits.
        rows: for each class of the ensemble, the place of its output, or -1.
    """

    outputs: Tensor
    places: Tensor
    known: Tensor

    def __init__(self, view: View, model: nn.Module, rows: Sequence[int]) -> None:
        super().__init__()
        self.view, self.model = view, model
        known = [row for row in rows if row >= 0]
        if max(known) >= num_logits(model):
            raise BundleError(
                f"malformed model description: rows name output {max(known)} of a model that has "
                f"{num_logits(model)}."
            )
        place = {row: number for number, row in enumerate(known)}
        indices = [place.get(row, len(known)) for row in rows]  # one beyond: the filler
        self.register_buffer("outputs", torch.tensor(known), persistent=False)
        self.register_buffer("places", torch.tensor(indices), persistent=False)
        self.register_buffer("known", torch.tensor([row >= 0 for row in rows]), persistent=False)
        self.knows_all = len(known) == len(rows)

    def forward(self, images: Tensor, filler: float) -> Tensor:
        """The ensemble's normalised images to logits (N, K); ``filler`` where the member knows no class."""
        logits = self.model(self.view(images)).index_select(1, self.outputs)
        if not self.knows_all:
            logits = nn.functional.pad(logits, (0, 1), value=filler)
        return logits.index_select(1, self.places)


class Ensemble(Several):
    """Several models whose answers are averaged, class by class, over the members that know the class.

    With ``shares[m, k]`` (sum 1 over the members that know class k, 0 for the others), z a member's logits of
    the classes of the ensemble that it knows, and T its temperature:

    - ``logits``: the mean logit, ``sum_m shares[m, k] z[m, k]``.
    - ``probabilities`` and ``stacking`` (whose shares were fitted): ``log sum_m shares[m, k] p[m, k]`` with
      ``p[m] = softmax(z[m] / T[m])``, computed in logarithms so that nothing underflows. The softmax of it is
      the mean probability of those who know the class, over the sum of that of all classes (which is 1 where
      every member knows every class).
    - of the multilabel task: the log odds of the mean of ``sigmoid(z / T)``, so that its sigmoid is the mean.

    Args:
        layout: the checked description.
        models: of the members.

    Raises:
        BundleError: a member has fewer outputs than the description names.
    """

    shares: Tensor
    temperatures: Tensor

    def __init__(self, layout: EnsembleLayout, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.combine: Combine = layout.combine
        self.task: Task = layout.task
        self.members = nn.ModuleList(
            Voter(View(layout.input, member.input), model, member.rows)
            for member, model in zip(layout.members, models, strict=True)
        )
        temperatures = torch.tensor([member.temperature for member in layout.members])
        self.register_buffer("temperatures", temperatures.view(1, -1, 1), persistent=False)
        known = self.known.double()
        self.register_buffer("shares", (known / known.sum(0)).float())

    @property
    def known(self) -> Tensor:
        """bool (M, K): which member knows which class."""
        return torch.stack([member.known for member in self.members])  # type: ignore[misc]

    @property
    def num_outputs(self) -> int:
        """K."""
        return self.shares.shape[1]

    @property
    def parts(self) -> list[nn.Module]:
        """The models of the members."""
        return [member.model for member in self.members]  # type: ignore[misc]

    def votes(self, images: Tensor, filler: float = NO_VOTE) -> Tensor:
        """Normalised images (N, 3, H, W) to the members' logits as they are: (N, M, K)."""
        return torch.stack([member(images, filler) for member in self.members], 1)

    def scaled_votes(self, images: Tensor) -> Tensor:
        """The members' logits over their temperatures, `NO_VOTE` for what they do not know: (N, M, K)."""
        votes = self.votes(images)
        return torch.where(self.known, votes / self.temperatures, votes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        if self.combine == "logits":
            return (self.votes(images, filler=0.0) * self.shares).sum(1)
        return combine_votes(self.scaled_votes(images), log_shares(self.shares, self.known), self.task)


def log_shares(shares: Tensor, known: Tensor) -> Tensor:
    """The logarithm of shares (M, K), finite: `NO_VOTE` where there is none."""
    logs = shares.clamp_min(torch.finfo(shares.dtype).tiny).log()
    return torch.where(known & (shares > 0), logs, torch.full_like(logs, NO_VOTE))


def combine_votes(votes: Tensor, logs: Tensor, task: Task) -> Tensor:
    """The linear pool of the members' probabilities, as logits.

    Args:
        votes: (N, M, K) logits over temperatures, `NO_VOTE` where a member does not know a class.
        logs: (M, K), from `log_shares`.
        task: softmax over the classes of each member, or a sigmoid for each.

    Returns:
        (N, K): log of the averaged probabilities; log odds of the multilabel task.
    """
    if task == "multilabel":
        odds = nn.functional.logsigmoid
        return torch.logsumexp(odds(votes) + logs, 1) - torch.logsumexp(odds(-votes) + logs, 1)
    return torch.logsumexp(votes.log_softmax(2) + logs, 1)


class Branch(nn.Module):
    """A member of a concatenation: the composite's normalised images to what the member's head reads.

    Args:
        view: from the composite's input to the member's.
        model: a classifier; its head is taken off.
    """

    def __init__(self, view: View, model: nn.Module) -> None:
        super().__init__()
        path, head = find_head(model)
        self.features = head_width(head)
        replace_module(model, path, nn.Identity())
        self.view, self.model = view, model

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, D), the mean over space."""
        return pool(self.model(self.view(images)))


class Concat(nn.Module):
    """The features of several models side by side, maps of them, and one linear head.

    Args:
        layout: the checked description.
        models: classifiers; their heads are taken off.

    Raises:
        BundleError: the features of a member have another width than the description names.
        ModelError: a member has no head of its own (an ensemble).
    """

    def __init__(self, layout: ConcatLayout, models: Sequence[nn.Module]) -> None:
        super().__init__()
        branches = [
            Branch(View(layout.input, member.input), model)
            for member, model in zip(layout.members, models, strict=True)
        ]
        for number, (member, branch) in enumerate(zip(layout.members, branches)):
            if branch.features != member.features:
                raise BundleError(
                    f"malformed model description: member {number} is said to have {member.features} "
                    f"features, and its head reads {branch.features}."
                )
        self.members = nn.ModuleList(branches)
        self.transforms = nn.ModuleList(
            build_transform(part.model_dump(by_alias=True)) for part in layout.transforms
        )
        self.head = nn.Linear(layout.head.width, layout.head.out)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K)."""
        features = torch.cat([member(images) for member in self.members], 1)
        for transform in self.transforms:
            features = transform(features)
        logits: Tensor = self.head(features)
        return logits

    def put_head(self, transforms: Sequence[Transform], head: nn.Linear) -> None:
        """Replace what reads the members' features."""
        self.transforms, self.head = nn.ModuleList(transforms), head
