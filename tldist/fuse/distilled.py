"""Fusion by distillation: the bundles teach one student on the target's images."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

from tldist.errors import RecipeError
from tldist.fuse.distill.domains import split_target
from tldist.fuse.distill.run import distill
from tldist.fuse.distill.student import start_student
from tldist.fuse.distill.teachers import load_teachers
from tldist.fuse.job import Fused, Job
from tldist.models.load import hash_tensors
from tldist.training.signals import stop_on_signals
from tldist.training.track import Journal


def fuse_by_distillation(job: Job) -> Fused:
    """Train a student on what the parents answer; the same call goes on from the last checkpoint.

    Raises:
        RecipeError: no data.
        Preempted: told to stop, and saved.
    """
    recipe, settings, team = job.recipe, job.recipe.distill, job.team
    if job.data is None or recipe.data is None:
        raise RecipeError("method=distill teaches on data=, images of the target, and none was given.")
    folders = [parent.folder for parent in job.parents]
    teachers = load_teachers(folders, recipe.weights, trust_code=recipe.trust_code)
    domains = split_target(job.data, settings.validation, recipe.seed, split=recipe.data.split)
    start = start_student(settings, teachers, domains.train, seed=recipe.seed, trust_code=recipe.trust_code)
    lineage = start.config.lineage
    team.same_everywhere("the student", hash_tensors(start.model.state_dict()))
    with closing(Journal(job.folder, (), {}, team)) as journal, stop_on_signals() as stop:
        found = distill(
            settings, teachers, start, domains, team, journal, stop, seed=recipe.seed, workers=job.workers
        )
    model, config = found.model.eval(), replace(found.config, lineage={})
    after = job.measure(model, config, job.test, "student") if job.test else None
    return Fused(model, config, notes={**found.notes, "student": lineage}, merged=after, after=after)
