"""Distil: prepare, let the teachers speak, train, choose, measure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from tldist.bundle import BundleConfig
from tldist.data.augment import Augmentation
from tldist.data.loader import Batch, load_batches
from tldist.data.order import plan_steps
from tldist.distributed import Team
from tldist.fuse.distill.domains import Domains
from tldist.fuse.distill.job import Job
from tldist.fuse.distill.prepare import prepare, show
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.student import student_labels
from tldist.fuse.distill.targets import Teach, feature_moments, from_file, from_teachers, load_outputs
from tldist.fuse.distill.teachers import Teacher, answering
from tldist.models.load import Start, input_tensor
from tldist.training.calibrate import calibrate
from tldist.training.fit import fit, restore_learner
from tldist.training.loop import Learner
from tldist.training.measure import Measurement
from tldist.training.optim import build_optimizer, learning_rate
from tldist.training.signals import StopFlag
from tldist.training.threads import own_threads
from tldist.training.track import Journal


@dataclass(frozen=True)
class Distilled:
    """What a distillation hands over.

    Attributes:
        model: the student with the chosen weights, in evaluation mode, on the device.
        config: its description, classes, preprocessing, temperature and metrics; the lineage is its start's.
        notes: for the run's summary, as plain JSON data.
    """

    model: nn.Module
    config: BundleConfig
    notes: dict[str, Any]


def distill(
    settings: DistillRecipe,
    teachers: Sequence[Teacher],
    start: Start,
    domains: Domains,
    team: Team,
    journal: Journal,
    stop: StopFlag,
    *,
    seed: int = 0,
    workers: int = 0,
) -> Distilled:
    """Let teachers teach a student; called by all processes together. The same call goes on where it stopped.

    The objective is Hinton et al.'s (arXiv:1503.02531): see `tldist.fuse.distill.objective`.

    Args:
        settings: how.
        teachers: of `load_teachers`.
        start: the student, of `start_student`.
        domains: of `split_target`.
        team: the processes.
        journal: takes the numbers; its folder takes checkpoints, and the teachers' outputs in ``work``.
        stop: whether this process was asked to stop.
        seed: of order, augmentation and dropout.
        workers: decoding processes of each process.

    Raises:
        Preempted: told to stop, and saved.
        DomainError: too many broken images.
        ModelError: a teacher's output is not finite.
        RecipeError: the job spreads its weights over processes (FSDP).
        Diverged: the loss is not a finite number.
    """
    with own_threads():
        job = prepare(settings, teachers, start, domains, team, journal, stop, seed, workers)
        show(job)
        torch.set_num_threads(job.threads)
        if domains.validation is not None and not job.by_accuracy:
            job.held = _teach(job, training=False, once=True)
        if not job.state.is_over or not job.state.is_measured:
            _train(job)
        return _finish(job)


def _teach(job: Job, *, training: bool, once: bool) -> Teach:
    """What gives the rows of the train or the validation images."""
    domain = job.domains.train if training else job.domains.validation
    assert domain is not None
    labels = student_labels(domain, job.classes)
    if not once:
        return from_teachers(_answer(job), labels, job.team.device)
    outputs = load_outputs(
        job.teachers, job.lesson.layout, job.settings, domain, job.how, job.numerics, job.team, job.folder,
        training=training, seed=job.seed, workers=job.workers, stop=job.stop,
    )  # fmt: skip
    return from_file(outputs, labels)


def _answer(job: Job) -> Any:
    return answering(job.teachers, job.lesson.layout, job.numerics)


def _train(job: Job) -> None:
    """All steps that are left."""
    student, state = job.student, job.state
    if job.lesson.layout.features and job.resumed is None:
        mean, scale = feature_moments(
            _answer(job), job.lesson.layout, job.domains.train, job.how, job.team, workers=job.workers
        )
        student.mean.copy_(mean)
        student.scale.copy_(scale)
    teach = _teach(job, training=True, once=job.once)
    if job.once:  # they have said all: the student may have their room
        for teacher in job.teachers:
            teacher.net.to("cpu")
    learner = _build_learner(job)
    if job.resumed is not None:
        restore_learner(job.resumed, learner)
    if job.domains.validation is not None:
        state.validate = lambda label: job.measure(job.numerics.precision, label)
    fit(state, learner, map(teach, _batches(job)), job.stop)


def _batches(job: Job) -> Iterator[Batch]:
    """This process's share of the steps that are left: decoded and augmented images."""
    settings = job.settings
    plans = plan_steps(
        size=len(job.domains.train),
        batch_size=settings.batch_size,
        seed=job.seed,
        epochs=settings.epochs,
        first_step=job.state.position.step,
        rank=job.team.rank,
        ranks=job.team.size,
    )
    return load_batches(
        job.domains.train,
        plans,
        job.how,
        augmentation=None if settings.augment.is_deterministic else Augmentation.of(settings.augment),
        views=settings.augment.views,
        seed=job.seed,
        workers=job.workers,
    )


def _build_learner(job: Job) -> Learner:
    settings, student = job.settings, job.student
    accelerator = job.team.accelerator(job.numerics.precision)
    optimizer = build_optimizer(
        student, name="adamw", lr=settings.lr, weight_decay=settings.weight_decay, momentum=0.0
    )
    wrapped, wrapped_optimizer = accelerator.prepare(student, optimizer)
    total = len(job.domains.train) * settings.epochs
    return Learner(
        model=student,
        wrapped=wrapped,
        # Accelerate's wrapper only scales the loss of fp16; it also searches for a library in every step.
        optimizer=wrapped_optimizer if accelerator.scaler is not None else optimizer,
        bare_optimizer=optimizer,
        accelerator=accelerator,
        team=job.team,
        frozen=[],
        objective=job.lesson.objective(student),
        to_input=lambda images: input_tensor(images, job.how, job.numerics.memory_format),
        learning_rate=lambda samples: learning_rate(samples, total, settings.lr, settings.warmup, "cosine"),
        seed=job.seed,
        pieces=settings.gradient_accumulation,
        clip=settings.clip,
        before_change=job.state.saver.settle,
    )


def _finish(job: Job) -> Distilled:
    """Choose the weights, measure them in fp32, as the bundle computes elsewhere."""
    state, config = job.state, job.start.config
    checkpoint = state.kept(job.settings.select == "best")
    job.student.load_state_dict(checkpoint.result())
    found = None
    if job.domains.validation is not None:
        found = job.measure("fp32", "validate the result", keep_logits=job.settings.calibrate)
    calibration = None
    if isinstance(found, Measurement):
        config = replace(config, metrics={"val_accuracy": found.accuracy, "val_loss": found.loss})
        calibration = calibrate(found) if job.settings.calibrate else None
    elif found is not None:
        config = replace(config, metrics=found.numbers())
    if calibration:
        config = replace(config, temperature=calibration["temperature"])
    notes = {
        "student": {"classes": len(job.classes), "known_rows": job.start.known_rows},
        "teacher_outputs": job.words,
        "steps": state.position.step,
        "selected_step": checkpoint.step,
        "selected_by": _selected_by(job),
        "train_images": len(job.domains.train),
        "broken_images": state.ledger.settle(job.team),
        "precision": job.numerics.precision,
        "channels_last": job.numerics.channels_last,
        "validation": found.to_dict() if found else None,
        "calibration": calibration,
    }
    return Distilled(job.student.net.eval(), config, notes)


def _selected_by(job: Job) -> str:
    if job.domains.validation is None or job.settings.select == "last":
        return "last weights"
    return "validation accuracy" if job.by_accuracy else "distillation loss on held-out images"
