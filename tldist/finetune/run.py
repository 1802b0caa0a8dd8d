"""Fine-tune: load, prepare, train, finish."""

from __future__ import annotations

import time

from tldist import distributed
from tldist.data.order import plan_steps
from tldist.files import canonical_json
from tldist.finetune.finish import finish, outcome_of
from tldist.finetune.plan import show_job
from tldist.finetune.prepare import Job, load_features, load_inputs, prepare
from tldist.finetune.recipe import FinetuneRecipe
from tldist.runs import Outcome, open_run, recorded
from tldist.training.fit import fit
from tldist.training.signals import StopFlag, stop_on_signals


def run(recipe: FinetuneRecipe) -> Outcome:
    """Fine-tune a model; the same call goes on where it stopped.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    team = distributed.start()
    distributed.check_precision(recipe.precision, team.device)
    inputs = load_inputs(recipe)
    fingerprints = inputs.fingerprints()
    team.same_everywhere("the data or the model", canonical_json(fingerprints))
    folder = team.on_main(lambda: open_run("finetune", recipe.out, recipe, fingerprints))
    if folder.finished:
        return outcome_of(folder, f"{folder.path} is finished already.")
    with recorded(folder, team.is_main), stop_on_signals() as stop:
        job = prepare(recipe, team, folder, inputs)
        show_job(job)
        begin = time.perf_counter()
        load_features(job)
        _train(job, stop)
        finish(job, time.perf_counter() - begin)
    return outcome_of(folder)


def _train(job: Job, stop: StopFlag) -> None:
    """All steps that are left."""
    recipe = job.recipe
    plans = plan_steps(
        size=len(job.inputs.train),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        epochs=recipe.epochs,
        first_step=job.state.position.step,
        rank=job.team.rank,
        ranks=job.team.size,
    )
    fit(job.state, job.train_batches(plans), stop)
