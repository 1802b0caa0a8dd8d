"""Fine-tune: load, prepare, plan, train phase by phase, finish."""

from __future__ import annotations

import time
from contextlib import closing

from tldist import distributed
from tldist.distributed import Team
from tldist.finetune.adapted import adapt
from tldist.finetune.finish import finish, outcome_of
from tldist.finetune.inputs import open_finetune
from tldist.finetune.learn import learn
from tldist.finetune.prepare import prepare
from tldist.finetune.recipe import FinetuneRecipe
from tldist.runs import Outcome, recorded
from tldist.training.signals import stop_on_signals
from tldist.training.threads import own_threads
from tldist.training.track import Journal


def run(recipe: FinetuneRecipe) -> Outcome:
    """Fine-tune a model, and adapt it where it is asked for; the same call goes on where it stopped.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    team = distributed.start()
    distributed.check_precision(recipe.precision, team.device)
    return adapt(recipe, team, _finetune) if recipe.adapt.is_on else _finetune(recipe, team)


def _finetune(recipe: FinetuneRecipe, team: Team) -> Outcome:
    inputs, folder = open_finetune(recipe, team)
    if folder.finished:
        return outcome_of(folder, f"{folder.path} is finished already.")
    journal = Journal(folder, recipe.track or (), recipe.model_dump(mode="json"), team)
    with recorded(folder, team.is_main), closing(journal), stop_on_signals() as stop, own_threads():
        begin = time.perf_counter()
        job, work, guards = learn(prepare(recipe, team, journal, inputs, stop))
        finish(job, work, guards, time.perf_counter() - begin)
    return outcome_of(folder)
