"""Several models, each aligned to the first: find the groups, match, permute, check that nothing broke."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import ModelError, RecipeError
from tldist.fuse.rebasin.activations import match_activations, on_model
from tldist.fuse.rebasin.spec import Permutations, Spec, cosine, num_moved, permute
from tldist.fuse.rebasin.trace import find_groups
from tldist.fuse.rebasin.weights import match_weights
from tldist.progress import warn
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger

_FEW = 0.75
_DIFFERENT = 0.01
"""Far above what another order of sums does to float32 (or TF32), far below what a wrong one does."""


@dataclass(frozen=True)
class RebasinSettings:
    """How models are aligned.

    Attributes:
        match: by their weights, or by their activations on images.
        seed: of the order in which weight matching takes groups, and of the batches of images.
        batch_size: images in one batch, on one process.
        most_batches: activations of at most so many batches; None: of all.
        workers: decoding processes.
    """

    match: Literal["weights", "activations"] = "weights"
    seed: int = 0
    batch_size: int = 64
    most_batches: int | None = None
    workers: int = 0


@dataclass(frozen=True)
class Aligned:
    """Models whose units stand in one order.

    Attributes:
        tensors: of each model by name, in their own types; the first model's as they were.
        spec: the groups that were permuted.
        permutations: of each model but the first.
        notes: plain data: what was found and done.
    """

    tensors: list[dict[str, Tensor]]
    spec: Spec
    permutations: list[Permutations]
    notes: dict[str, Any]


def align_to_first(
    parents: Sequence[Mapping[str, Tensor]],
    labels: Sequence[str],
    model: nn.Module,
    how: Preprocessing,
    team: Team,
    settings: RebasinSettings | None = None,
    *,
    domain: Domain | None = None,
    ledger: Ledger | None = None,
) -> Aligned:
    """Permute the hidden units of models so that they match the first one's; called by all processes.

    Each model computes what it did before: that is checked, on noise.

    Args:
        parents: tensors of each model by name, on the CPU; rows of their heads in one order of classes.
        labels: what to call them in messages.
        model: of their architecture, on the team's device; put into evaluation mode, its weights not used.
        how: its preprocessing.
        team: the processes; all get the same.
        settings: None: the defaults.
        domain: the images that ``match="activations"`` needs.
        ledger: takes the broken ones; None: one without a list.

    Raises:
        RecipeError: activations are to be matched and there are no images.
        ModelError: the architecture cannot be aligned, or tensors are missing or not finite.
        DomainError: see `match_activations`.
    """
    settings = settings or RebasinSettings()
    if settings.match == "activations" and domain is None:
        raise RecipeError(
            "rebasin with match=activations needs data=, the images that the models are to see."
        )
    for label, tensors in zip(labels, parents, strict=True):
        _check_tensors(label, tensors, model)
    spec = find_groups(model, (how.height, how.width))
    if spec.share < _FEW:
        warn(
            f"{type(model).__name__}: only {spec.share:.0%} of the network can be aligned; the rest is "
            f"merged as it is, which rarely works for models that did not start from the same weights"
        )
    first, aligned, notes = parents[0], [dict(parents[0])], []
    permutations = []
    for label, other in zip(labels[1:], parents[1:]):
        found = _match(first, other, model, spec, how, team, settings, domain, ledger)
        permuted = permute(other, spec, found)
        _check_function(label, model, other, permuted, how)
        aligned.append(permuted)
        permutations.append(found)
        notes.append(
            {
                "label": label,
                "moved": num_moved(found),
                "similarity_before": cosine(first, other, spec),
                "similarity_after": cosine(first, permuted, spec),
            }
        )
    return Aligned(
        aligned,
        spec,
        permutations,
        {
            "match": settings.match,
            "groups": len(spec.groups),
            "units": sum(group.size for group in spec.groups),
            "share": spec.share,
            "models": notes,
        },
    )


def _check_tensors(label: str, tensors: Mapping[str, Tensor], model: nn.Module) -> None:
    odd = sorted(model.state_dict().keys() ^ tensors.keys())
    if odd:
        raise ModelError(
            f"{label} and {type(model).__name__} do not hold the same tensors: {odd[0]} and "
            f"{len(odd) - 1} more are in one of them only."
        )
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise ModelError(f"{label} cannot be aligned: its tensor {bad[0]} holds NaN or infinity.")


def _match(
    first: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    model: nn.Module,
    spec: Spec,
    how: Preprocessing,
    team: Team,
    settings: RebasinSettings,
    domain: Domain | None,
    ledger: Ledger | None,
) -> Permutations:
    """The permutations of one model, those of the main process on all."""
    if settings.match == "activations":
        assert domain is not None
        found = match_activations(
            model,
            first,
            other,
            spec,
            how,
            domain,
            team,
            ledger or Ledger(domain, None),
            batch_size=settings.batch_size,
            seed=settings.seed,
            workers=settings.workers,
            most_batches=settings.most_batches,
        )
    else:
        found = match_weights(first, other, spec, settings.seed, team.device)
    # All have computed the same, and none has waited; other hardware may round a tie another way.
    return team.on_main(lambda: found)


@torch.no_grad()
def _check_function(
    label: str,
    model: nn.Module,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    how: Preprocessing,
) -> None:
    """Refuse permutations that change what a model computes.

    Raises:
        ModelError: they do; the network does something that its graph does not show.
    """
    noise = torch.randn(2, 3, how.height, how.width, generator=torch.Generator().manual_seed(0))
    images = noise.to(next(model.parameters()))
    old, new = (
        functional_call(model, on_model(model, tensors), (images,), tie_weights=False).double()
        for tensors in (before, after)
    )
    if not torch.isfinite(old).all():
        warn(f"{label} gives NaN or infinity on noise: whether its permutation is right was not checked")
    elif float((new - old).norm()) > _DIFFERENT * float(old.norm()):
        raise ModelError(
            f"{label} cannot be aligned: {type(model).__name__} computes something else when its hidden "
            f"units are permuted, for a reason that its graph does not show. Use another method."
        )
