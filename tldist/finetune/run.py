"""Fine-tune: load, prepare, plan, train phase by phase, finish."""

from __future__ import annotations

import time
from contextlib import closing

from tldist import distributed
from tldist.data.order import plan_steps
from tldist.finetune.finish import finish, outcome_of, prove_frozen
from tldist.finetune.frozen import FrozenPart
from tldist.finetune.guards import Guards, look_for_duplicates, plain_probe
from tldist.finetune.inputs import load_inputs
from tldist.finetune.job import Job
from tldist.finetune.phases import Phase
from tldist.finetune.plan import show_job
from tldist.finetune.prepare import prepare
from tldist.finetune.recipe import FinetuneRecipe
from tldist.finetune.stage import Work, enter, plan_part
from tldist.runs import Outcome, open_run, recorded
from tldist.training.fit import fit
from tldist.training.signals import stop_on_signals
from tldist.training.threads import own_threads
from tldist.training.track import Journal


def run(recipe: FinetuneRecipe) -> Outcome:
    """Fine-tune a model; the same call goes on where it stopped.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    team = distributed.start()
    distributed.check_precision(recipe.precision, team.device)
    inputs = load_inputs(recipe)
    fingerprints = inputs.fingerprints()
    team.agree(recipe, fingerprints)
    folder = team.on_main(lambda: open_run("finetune", recipe.out, recipe, fingerprints))
    if folder.finished:
        return outcome_of(folder, f"{folder.path} is finished already.")
    journal = Journal(folder, recipe.track or (), recipe.model_dump(mode="json"), team)
    with recorded(folder, team.is_main), closing(journal), stop_on_signals() as stop, own_threads():
        job = prepare(recipe, team, journal, inputs, stop)
        planned = [(phase, *plan_part(job, phase)) for phase in job.phases]
        show_job(job, planned)
        begin = time.perf_counter()
        guards = Guards(look_for_duplicates(job), plain_probe(job))
        work: Work | None = None
        for phase, part, _ in planned:
            if _is_due(job, phase):
                work = _train(job, phase, part)
                if team.shards:
                    job, work = _gathered(job), None
        finish(job, work, guards, time.perf_counter() - begin)
    return outcome_of(folder)


def _is_due(job: Job, phase: Phase) -> bool:
    """Whether a phase has steps left, or its last measurement."""
    step, end = job.state.position.step, phase.last_epoch * job.state.epoch_steps
    return (step < end and not job.state.is_over) or (step == end and not job.state.is_measured)


def _gathered(job: Job) -> Job:
    """The fine-tuning with its model whole on each process again: as a start that goes on from the last
    checkpoint has it."""
    prove_frozen(job)
    return prepare(job.recipe, job.team, job.state.journal, load_inputs(job.recipe), job.stop)


def _train(job: Job, phase: Phase, part: FrozenPart | None) -> Work:
    """All steps of a phase that are left."""
    work = enter(job, phase, part)
    if job.inputs.validation:
        job.state.validate = lambda label: work.validate(job, label)
    plans = plan_steps(
        size=len(job.inputs.train),
        batch_size=job.recipe.batch_size,
        seed=job.recipe.seed,
        epochs=phase.last_epoch,
        first_step=job.state.position.step,
        rank=job.team.rank,
        ranks=job.team.size,
    )
    fit(job.state, work.learner, work.batches(job, plans), job.stop)
    return work
