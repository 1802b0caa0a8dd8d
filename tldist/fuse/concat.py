"""A concatenation from models of any architectures: their features side by side, and one new head.

Axes: N images, D features of all members together, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tldist.bundle import BundleConfig
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import DomainError, ModelError, RecipeError
from tldist.features.extract import extract
from tldist.features.heads import LinearHead
from tldist.fuse.concat_head import Join, Joined, fit_head
from tldist.fuse.outputs import Parents, common_preprocessing, label_of
from tldist.models.chain import Affine
from tldist.models.composite import Concat
from tldist.models.composite_layout import ConcatLayout, Input, read_layout
from tldist.models.heads import Several, find_head, head_width, tapped
from tldist.models.load import input_tensor
from tldist.models.view import View
from tldist.progress import warn
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger


def build_concat(
    parents: Parents,
    data: Domain,
    team: Team,
    options: Join | None = None,
    *,
    ledger: Ledger | None = None,
) -> tuple[Concat, BundleConfig, Joined]:
    """Join the features of several models and fit one head on a labelled domain; called by all processes.

    Each image is decoded once and each backbone sees it once; the features of all images are then held in
    memory. They are standardised, member by member, optionally projected on their principal components, and
    read by a head of multinomial logistic regression. What can be folded is: without a projection the
    standardisation is part of the head, with one it is part of the projection.

    Args:
        parents: classifiers in evaluation mode, on the team's device; their heads are taken off in place.
        data: the target domain; the classes of its train split become those of the result.
        team: the processes.
        options: None: the defaults.
        ledger: of ``data.training_split()``; takes the broken images.

    Returns:
        The model in evaluation mode, its configuration without lineage and metrics, how the head came out.

    Raises:
        DomainError: no labels, several classes an image, fewer than two classes, or too few images.
        ModelError: a parent is an ensemble, or computes something after its head.
        RecipeError: a projection to more numbers than there are.
    """
    options = options or Join()
    train, held_out = _training_data(data, options)
    configs = [config for _, config in parents]
    how = common_preprocessing(configs)
    widths = _widths(parents)
    if options.projection is not None and not 1 <= options.projection <= sum(widths):
        raise RecipeError(
            f"projection={options.projection}: the members have {sum(widths)} features together; give a "
            f"number from 1 to that, or none."
        )
    classes = train.used_classes
    description = _describe(configs, how, widths, len(classes))
    concat = _take_heads_off(parents, description, how, team)
    features = extract(
        concat,
        how,
        train,
        team,
        batch_size=options.batch_size,
        workers=options.workers,
        classes=classes,
        ledger=ledger,
        label=f"features of {len(parents)} models",
    )
    chosen = torch.from_numpy(held_out)[features.indices]
    transform, sweep, kept = team.on_main(lambda: fit_head(features, chosen, widths, len(classes), options))
    if not sweep.head.converged:
        warn("the head's fit stopped before it converged; its penalty may be too weak for these features")
    _put(concat, transform, sweep.head, team)
    described = {**description, "transforms": [transform.describe()] if transform else []}
    described["head"] = {"type": "linear", "in": sweep.head.weight.shape[1], "out": len(classes)}
    config = BundleConfig(described, classes, how)
    return concat.eval(), config, Joined(sweep, widths, len(features), kept)


def _training_data(data: Domain, options: Join) -> tuple[Domain, np.ndarray]:
    """The split to fit on, and which of its samples choose the penalty: bool (N,)."""
    train = data.training_split()
    if not train.has_labels or train.is_multilabel:
        found = "several classes an image" if train.is_multilabel else "no labels"
        raise DomainError(f"{train.name}: {found}; the head of a concatenation is fitted on one class each.")
    if len(train.used_classes) < 2:
        raise DomainError(f"{train.name}: a single class; a head needs at least two.")
    held = train.carve(options.held_out, options.seed)[1]
    if len(held) == 0:
        raise DomainError(
            f"{train.name}: every class has a single image, so none can be held out to choose the head's "
            f"penalty. Give at least two images of a class."
        )
    return train, np.isin(train.rows, held.rows)


def _widths(parents: Parents) -> tuple[int, ...]:
    for number, (model, config) in enumerate(parents, 1):
        if isinstance(model, Several):
            raise ModelError(
                f"{label_of(config, number)} is an ensemble: it has no head whose features could be joined. "
                f"Give its members in its place."
            )
    return tuple(head_width(find_head(model)[1]) for model, _ in parents)


def _describe(
    configs: Sequence[BundleConfig], how: Preprocessing, widths: Sequence[int], outputs: int
) -> dict[str, Any]:
    """With a head on all features as they are."""
    members = [
        {"model": config.model, "input": Input.of(config.preprocessing).model_dump(), "features": width}
        for config, width in zip(configs, widths)
    ]
    head = {"type": "linear", "in": sum(widths), "out": outputs}
    own = Input.of(how).model_dump()
    return {"type": "concat", "input": own, "members": members, "transforms": [], "head": head}


@torch.no_grad()
def _take_heads_off(parents: Parents, description: dict[str, Any], how: Preprocessing, team: Team) -> Concat:
    """The concatenation, once its features are proved to be what the heads read."""
    layout = read_layout(ConcatLayout, description)
    noise = np.random.default_rng(0).integers(0, 256, (2, how.height, how.width, 3), dtype=np.uint8)
    images = input_tensor(torch.from_numpy(noise).to(team.device), how)
    expected = []
    for (model, _), member in zip(parents, layout.members):
        with tapped(model) as features:
            model(View(layout.input, member.input).to(team.device)(images))
            expected.append(features())
    concat = Concat(layout, [model for model, _ in parents]).to(team.device).eval()
    for number, (branch, seen) in enumerate(zip(concat.members, expected), 1):
        found = branch(images)
        if found.shape != seen.shape or not float((found - seen).abs().max()) <= 1e-3 * float(
            seen.abs().max()
        ):
            raise ModelError(
                f"{label_of(parents[number - 1][1], number)} computes something after its last linear layer, "
                f"so its head cannot be taken off: without it the features are others."
            )
    return concat


@torch.no_grad()
def _put(concat: Concat, transform: Affine | None, fitted: LinearHead, team: Team) -> None:
    """Give the concatenation what was fitted, in float32."""
    head = nn.Linear(fitted.weight.shape[1], fitted.weight.shape[0])
    head.weight.copy_(fitted.weight)
    head.bias.copy_(fitted.bias)
    transforms = [] if transform is None else [transform.float()]
    concat.put_head(transforms, head)
    concat.to(team.device)
