"""All phases of a fine-tuning, one after the other, from wherever it stands."""

from __future__ import annotations

from collections.abc import Iterator

from tldist.data.order import StepPlan, plan_steps
from tldist.finetune.finish import prove_frozen
from tldist.finetune.frozen import FrozenPart
from tldist.finetune.guards import Guards, look_for_duplicates, plain_probe
from tldist.finetune.inputs import load_inputs
from tldist.finetune.job import Job
from tldist.finetune.phases import Phase
from tldist.finetune.plan import show_job
from tldist.finetune.prepare import prepare
from tldist.finetune.stage import Work, enter, plan_part
from tldist.training.fit import fit


def learn(job: Job, *, guarded: bool = True) -> tuple[Job, Work | None, Guards]:
    """Show the plan, look at the data, take all steps that are left.

    Args:
        job: the fine-tuning.
        guarded: look for duplicates and measure a plain probe first.

    Returns:
        The fine-tuning (anew, where its weights were spread over processes), what its last phase worked with
        (None where nothing was left to do), and what was found before the first step.
    """
    planned = [(phase, *plan_part(job, phase)) for phase in job.phases]
    show_job(job, planned)
    guards = Guards(look_for_duplicates(job), plain_probe(job)) if guarded else Guards(None, None)
    work: Work | None = None
    for phase, part, _ in planned:
        if _is_due(job, phase):
            work = _train(job, phase, part)
            if job.team.shards:
                job, work = _gathered(job), None
    return job, work, guards


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

    first_step = job.state.position.step

    def plans() -> Iterator[StepPlan]:
        return plan_steps(
            size=len(job.inputs.train),
            batch_size=job.recipe.batch_size,
            seed=job.recipe.seed,
            epochs=phase.last_epoch,
            first_step=first_step,
            rank=job.team.rank,
            ranks=job.team.size,
        )

    fit(job.state, work.learner, work.batches(job, plans), job.stop)
    return work
