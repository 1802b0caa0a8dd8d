"""A distillation, prepared: the student, what it is taught, how it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tldist.data.loader import Batch
from tldist.distributed import Team
from tldist.fuse.distill.domains import Domains
from tldist.fuse.distill.judge import Agreement, judge
from tldist.fuse.distill.objective import (
    features_loss,
    labels_loss,
    soft_targets,
    teachers_loss,
    total_loss,
    vote_matrix,
)
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.student import Student
from tldist.fuse.distill.targets import Teach
from tldist.fuse.distill.teachers import Layout, Teacher
from tldist.models.load import Start, input_tensor
from tldist.runtime.preprocess import Preprocessing
from tldist.training.checkpoint import Checkpoint
from tldist.training.fit import Fit
from tldist.training.measure import Measurement, measure, predictor
from tldist.training.objective import Objective
from tldist.training.precision import Numerics
from tldist.training.signals import StopFlag


@dataclass(frozen=True)
class Lesson:
    """What the rows of a batch mean to the student.

    Attributes:
        layout: of a row.
        votes: float32 (J, K), on the device.
        weights: float32 (D,), on the device, of the teachers' features.
        settings: temperature and shares.
    """

    layout: Layout
    votes: Tensor
    weights: Tensor
    settings: DistillRecipe

    @property
    def num_classes(self) -> int:
        """K."""
        return self.votes.shape[1]

    def targets(self, logits: Tensor) -> Tensor:
        """The teachers' logits (N, J) to their soft targets (N, K)."""
        return soft_targets(logits, self.layout.logits, self.votes, self.settings.temperature)

    def objective(self, student: Student) -> Objective:
        """The student's outputs (N, K + D) and rows (N, 1 + J + D) to the loss of each image (N,)."""
        temperature, voted = self.settings.temperature, self.votes.any(0)

        def losses(outputs: Tensor, rows: Tensor) -> Tensor:
            labels, said, features = self.layout.split(rows)
            logits, projected = outputs[:, : self.num_classes], outputs[:, self.num_classes :]
            by_teachers = teachers_loss(logits, self.targets(said), voted, temperature)
            by_labels = labels_loss(logits, labels)
            total = total_loss(by_teachers, by_labels, labels >= 0, self.settings.labels_share)
            if not self.layout.features:
                return total
            standard = (features - student.mean) / student.scale
            return total + self.settings.features * features_loss(projected, standard, self.weights)

        return losses


def lesson_of(
    settings: DistillRecipe,
    teachers: Sequence[Teacher],
    layout: Layout,
    classes: Sequence[str],
    device: torch.device,
) -> Lesson:
    """What these teachers' outputs mean to a student with these classes."""
    known, shares = [t.config.classes for t in teachers], [t.share for t in teachers]
    weights = [torch.full((width,), share / width) for share, width in zip(shares, layout.features)]
    return Lesson(
        layout,
        vote_matrix(known, shares, classes).float().to(device),
        torch.cat(weights).to(device) if weights else torch.zeros(0, device=device),
        settings,
    )


@dataclass
class Job:
    """A distillation, prepared.

    Attributes:
        settings, team, teachers, start, domains, stop, seed, workers: what it was prepared from.
        folder: where the teachers' outputs lie.
        student: what learns.
        lesson: what it is taught.
        numerics: how it computes.
        threads: that this process trains on while images are decoded beside it.
        by_accuracy: whether validation has labels that the student can be measured by.
        state: where the training stands.
        resumed: the checkpoint that it goes on from.
        once, words: whether the teachers run once an image, and why or why not.
        held: teaches the validation images, where the student is measured by its teachers.
    """

    settings: DistillRecipe
    team: Team
    teachers: Sequence[Teacher]
    start: Start
    domains: Domains
    stop: StopFlag
    seed: int
    workers: int
    folder: Path
    student: Student
    lesson: Lesson
    numerics: Numerics
    threads: int
    by_accuracy: bool
    state: Fit
    resumed: Checkpoint | None
    once: bool
    words: str
    held: Teach | None = None

    @property
    def how(self) -> Preprocessing:
        """The student's preprocessing."""
        return self.start.config.preprocessing

    @property
    def classes(self) -> tuple[str, ...]:
        """The student's classes."""
        return self.start.config.classes

    def measure(self, precision: str, label: str, *, keep_logits: bool = False) -> Measurement | Agreement:
        """Measure the student as it is now on validation; called by all processes together.

        Args:
            precision: of the matrix products.
            label: of the bar.
            keep_logits: hand over the logits too, where there are labels.
        """
        assert self.domains.validation is not None
        self.team.same_buffers(self.student)
        self.student.eval()  # the whole of it: the loop looks at the outermost module to go back to training
        if not self.by_accuracy:
            assert self.held is not None
            return judge(
                lambda batch: self._losses(batch, precision), self.domains.validation, self.how, self.held,
                self.team, workers=self.workers, label=label, stop=self.stop,
            )  # fmt: skip
        return measure(
            predictor(
                self.student.net, self.how, precision=precision, channels_last=self.numerics.channels_last
            ),
            self.domains.validation,
            self.classes,
            self.how,
            self.team,
            workers=self.workers,
            label=label,
            keep_logits=keep_logits,
            stop=self.stop,
        )

    @torch.no_grad()
    def _losses(self, batch: Batch, precision: str) -> tuple[Tensor, Tensor]:
        """Of a taught batch: the loss of each image, and whether student and teachers agree."""
        device = self.team.device
        inputs = input_tensor(batch.images.to(device), self.how, self.numerics.memory_format)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        with torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32"):
            outputs: Tensor = self.student(inputs)
        outputs, rows = outputs.float(), batch.labels.to(device)
        said = self.lesson.targets(self.lesson.layout.split(rows)[1])
        agrees = said.argmax(1) == outputs[:, : self.lesson.num_classes].argmax(1)
        return self.lesson.objective(self.student)(outputs, rows), agrees
