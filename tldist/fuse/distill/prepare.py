"""A distillation made ready: student and teachers on the device, numerics, from which checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

from tldist.distributed import Team
from tldist.errors import RecipeError
from tldist.fuse.distill.domains import Domains
from tldist.fuse.distill.job import Job, lesson_of
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.student import Student
from tldist.fuse.distill.targets import plan_outputs
from tldist.fuse.distill.teachers import Teacher, layout_of
from tldist.models.description import architecture_name
from tldist.models.load import Start
from tldist.progress import say, show_plan, warn
from tldist.runs import CHECKPOINTS
from tldist.training.checkpoint import Position
from tldist.training.fit import Fit, resume
from tldist.training.ledger import LEDGER, Ledger
from tldist.training.measure import why_not_measurable
from tldist.training.precision import settle_numerics
from tldist.training.saver import Saver
from tldist.training.signals import StopFlag
from tldist.training.threads import settle_threads
from tldist.training.track import Journal

WORK = "work"
"""Folder of a run for what can be computed again."""


def prepare(
    settings: DistillRecipe,
    teachers: Sequence[Teacher],
    start: Start,
    domains: Domains,
    team: Team,
    journal: Journal,
    stop: StopFlag,
    seed: int,
    workers: int,
) -> Job:
    """Put all on the device, choose the numerics, load the newest checkpoint.

    Raises:
        RecipeError: the job spreads its weights over processes.
    """
    if team.shards:
        raise RecipeError(
            "method=distill: not with FSDP, which spreads the weights over the processes. Start with a "
            "configuration of plain data-parallel processes (DDP)."
        )
    run, how = journal.folder, start.config.preprocessing
    folder = run.path / WORK
    team.on_main(lambda: folder.mkdir(exist_ok=True))
    layout = layout_of(teachers, settings.features > 0)
    student = Student(start.model, layout, seed).to(team.device)
    share = -(-settings.batch_size // (team.size * settings.gradient_accumulation))
    size = (how.height, how.width)
    numerics = settle_numerics(
        settings.precision,
        settings.channels_last,
        run.path / "precision.json",
        student,
        [],
        size,
        team,
        share,
    )
    student.to(memory_format=numerics.memory_format)
    for teacher in teachers:
        teacher.net.to(team.device).to(memory_format=numerics.memory_format)
    threads = settle_threads(team, student, size, domains.train, workers)
    position, resumed = resume(run, team, student, None)
    once, words = team.on_main(lambda: plan_outputs(settings, layout, len(domains.train), folder))
    return Job(
        settings=settings,
        team=team,
        teachers=teachers,
        start=start,
        domains=domains,
        stop=stop,
        seed=seed,
        workers=workers,
        folder=folder,
        student=student,
        lesson=lesson_of(settings, teachers, layout, start.config.classes, team.device),
        numerics=numerics,
        threads=threads,
        by_accuracy=_is_measurable(domains, start),
        state=_state(settings, team, journal, domains, position),
        resumed=resumed,
        once=once,
        words=words,
    )


def _is_measurable(domains: Domains, start: Start) -> bool:
    """Whether validation has labels that choose; said where it has not."""
    if domains.validation is None:
        return False
    reason = why_not_measurable(domains.validation, start.config.classes, "multiclass")
    if reason:
        say(f"the lowest distillation loss on {domains.validation.name} chooses the best: {reason}")
    return reason is None


def _state(
    settings: DistillRecipe, team: Team, journal: Journal, domains: Domains, position: Position
) -> Fit:
    folder = journal.folder
    ledger = Ledger(domains.train, folder.path / LEDGER)
    ledger.found = {int(index): reason for index, reason in position.broken.items()}
    return Fit(
        folder=folder,
        journal=journal,
        position=position,
        ledger=ledger,
        images=len(domains.train),
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        validates=domains.validation is not None,
        every_steps=settings.checkpoint.every_steps,
        saver=Saver(folder.path / CHECKPOINTS, settings.checkpoint.keep, (), team),
    )


def show(job: Job) -> None:
    """Print the plan, and what a person may not expect."""
    how, domains, settings = job.how, job.domains, job.settings
    rows = {
        f"teacher {number}": f"{teacher.share:.4f} of {architecture_name(teacher.config.model)} in "
        f"{teacher.folder}, {len(teacher.config.classes)} classes"
        for number, teacher in enumerate(job.teachers, 1)
    }
    labelled = int((domains.train.labels >= 0).sum()) if settings.labels_share > 0 else 0
    judged = "accuracy" if job.by_accuracy else "distillation loss"
    held = (
        f"{len(domains.validation):,} choose the best by {judged}" if domains.validation else "none held out"
    )
    show_plan(
        "distill",
        {
            "student": f"{architecture_name(job.start.config.model)}, {len(job.classes)} classes, input "
            f"{how.height}x{how.width}",
            **rows,
            "teachers run": job.words,
            "images": f"{len(domains.train):,} to learn from, {labelled:,} with a label used; {held}",
            "steps": f"{job.state.total_steps:,} of {settings.batch_size} images ({settings.epochs} epochs)",
            "precision": f"{job.numerics.precision} ({job.numerics.reason})",
        },
    )
    for teacher in job.teachers:
        needs = teacher.config.preprocessing
        if needs.height > how.height or needs.width > how.width:
            warn(
                f"{teacher.folder} sees images of {how.height}x{how.width} enlarged to {needs.height}x"
                f"{needs.width}, as the student's input is smaller; distill.image_size= raises it"
            )
