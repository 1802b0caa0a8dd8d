"""A distillation as a stage would run it: for tests in this process, on ranks, and as a command."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from tldist import distributed
from tldist.data.loader import num_workers
from tldist.domain import DataRecipe, open_domain
from tldist.errors import TldistError
from tldist.fuse.distill.domains import split_target
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.run import Distilled, distill
from tldist.fuse.distill.student import start_student
from tldist.fuse.distill.teachers import load_teachers
from tldist.models.load import hash_tensors, save_bundle
from tldist.recipe import Free, Recipe, read_recipe
from tldist.runs import BUNDLE, open_run, recorded
from tldist.training.signals import stop_on_signals
from tldist.training.track import Journal


class DistillRun(Recipe):
    """The settings of a test's distillation."""

    inputs: ClassVar[tuple[str, ...]] = ("teachers*",)

    teachers: tuple[Path, ...]
    data: DataRecipe
    out: Free[Path]
    shares: tuple[float, ...] | None = None
    seed: int = 0
    workers: Free[int | None] = 0
    distill: DistillRecipe = DistillRecipe()


def run(recipe: DistillRun) -> Distilled:
    """Distil, save ``RUN/bundle`` and the summary."""
    team = distributed.start()
    teachers = load_teachers(recipe.teachers, recipe.shares, trust_code=True)
    domains = split_target(
        open_domain(recipe.data), recipe.distill.validation, recipe.seed, split=recipe.data.split
    )
    start = start_student(recipe.distill, teachers, domains.train, seed=recipe.seed, trust_code=True)
    inputs = {"model": hash_tensors(start.model.state_dict()), "data": domains.train.fingerprint}
    team.agree(recipe, inputs)
    folder = team.on_main(lambda: open_run("fuse", recipe.out, recipe, inputs))
    journal = Journal(folder, (), {}, team)
    with recorded(folder, team.is_main), closing(journal), stop_on_signals() as stop:
        result = distill(
            recipe.distill, teachers, start, domains, team, journal, stop,
            seed=recipe.seed, workers=num_workers(recipe.workers, team.local_size),
        )  # fmt: skip
        team.on_main(lambda: save_bundle(folder.path / BUNDLE, result.model, result.config))
        team.on_main(lambda: folder.write_summary("done", **result.notes))
    return result


def main(arguments: list[str]) -> int:
    """As a command; returns its exit code."""
    try:
        run(read_recipe(DistillRun, arguments))
    except TldistError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0
