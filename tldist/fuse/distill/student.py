"""The model that learns: its classes, where it starts, and what it answers while it learns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tldist.data.order import seed_of
from tldist.domain import Domain, sort_names
from tldist.errors import ModelError
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.teachers import Layout, Teacher
from tldist.models.heads import find_head, head_width, tapped
from tldist.models.load import Start, start_model


def student_classes(teachers: Sequence[Teacher], domain: Domain, labels_share: float) -> tuple[str, ...]:
    """All classes that a teacher knows or a label names, in natural order."""
    names = {name for teacher in teachers for name in teacher.config.classes}
    taught = domain.used_classes if labels_share > 0 and not domain.is_multilabel else ()
    return sort_names(names | set(taught))


def student_labels(domain: Domain, classes: Sequence[str]) -> np.ndarray:
    """int64 (N,), positions in ``classes``; -1 where a sample has none of them, or several."""
    place = {name: position for position, name in enumerate(classes)}
    table = [place.get(name, -1) for name in domain.classes]
    return np.array([*table, -1], dtype=np.int64)[domain.labels]


def start_student(
    settings: DistillRecipe,
    teachers: Sequence[Teacher],
    domain: Domain,
    *,
    seed: int,
    trust_code: bool = False,
) -> Start:
    """Build the student; what is new in its head depends on the seed alone.

    Args:
        settings: what it shall be.
        teachers: their classes become its own.
        domain: what it learns from; so do the classes of its labels.
        seed: of what is initialised.
        trust_code: allow a bundle that names code of its own.

    Raises:
        ModelError, BundleError: see `tldist.models.load.start_model`.
    """
    torch.manual_seed(seed_of("init", seed))
    return start_model(
        settings.model or str(teachers[0].folder.absolute()),
        settings.weights,
        student_classes(teachers, domain, settings.labels_share),
        image_size=settings.image_size,
        trust_code=trust_code,
    )


class Student(nn.Module):
    """A network and, while it learns from features, a projection of its own into the teachers' space.

    Args:
        net: the network; it alone is the result.
        layout: of what the teachers say.
        seed: of the projection.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, net: nn.Module, layout: Layout, seed: int) -> None:
        super().__init__()
        self.net = net
        self.projection: nn.Linear | None = None
        width = sum(layout.features)
        if width:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of("projection", seed))
                self.projection = nn.Linear(head_width(find_head(net)[1]), width)
            # Of the teachers' features; here, so that a run that goes on has the same.
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("scale", torch.ones(width))

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, H, W) to logits (N, K), and beside them projected features (N, D)."""
        if self.projection is None:
            logits: Tensor = self.net(images)
            return logits
        with tapped(self.net) as features:
            logits = self.net(images)
            seen = features()
        if seen.shape[1] != self.projection.in_features:
            raise ModelError(
                f"the student's head reads features of width {seen.shape[1]}, not "
                f"{self.projection.in_features}: distill.features cannot be used with this architecture."
            )
        return torch.cat([logits, self.projection(seen)], 1)
