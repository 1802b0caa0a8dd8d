"""Fine-tune and adapt: source-only beside, adapt, choose without labels, measure once, keep the better."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from tldist.adaptation.recipe import AdaptRecipe
from tldist.bundle import find_bundle, read_bundle
from tldist.data.loader import num_workers
from tldist.distributed import Team
from tldist.errors import ModelError, RecipeError
from tldist.features.scorers.choose import SOURCE_ONLY
from tldist.files import read_json
from tldist.finetune.adapt import candidate_steps, find_adaptation
from tldist.finetune.choose import Bench, Trial, check_scorers, settle
from tldist.finetune.finish import finish, outcome_of
from tldist.finetune.guards import Guards
from tldist.finetune.inputs import Inputs, on_the_target, open_finetune
from tldist.finetune.job import Job
from tldist.finetune.learn import learn
from tldist.finetune.prepare import prepare
from tldist.finetune.recipe import FinetuneRecipe
from tldist.finetune.stage import Work
from tldist.finetune.unseal import unseal
from tldist.models.load import load_bundle, save_bundle
from tldist.progress import say, warn
from tldist.recipe import check_same_run, read_yaml
from tldist.runs import BUNDLE, INPUTS, RECIPE, Outcome, RunFolder, recorded
from tldist.training.batchnorm import batchnorm_layers, reestimate
from tldist.training.checkpoint import Checkpoint, list_checkpoints
from tldist.training.ledger import LEDGER, Ledger
from tldist.training.signals import StopFlag, stop_on_signals
from tldist.training.threads import own_threads
from tldist.training.track import Journal

Finetune = Callable[[FinetuneRecipe, Team], Outcome]


@dataclass(frozen=True)
class _Run:
    """An adaptation under way.

    Attributes:
        recipe, team, folder, inputs, stop: what it works with.
        base: the bundle of source-only.
        begin: when it was started, in seconds.
    """

    recipe: FinetuneRecipe
    team: Team
    folder: RunFolder
    inputs: Inputs
    stop: StopFlag
    base: Path
    begin: float

    @property
    def bench(self) -> Bench:
        """What the trials are judged on."""
        inputs = self.inputs
        assert inputs.target is not None
        return Bench(
            self.recipe, self.team, self.folder, self.stop, inputs.how, inputs.classes, inputs.target,
            inputs.train if self.recipe.data is not None else None, inputs.validation,
            num_workers(self.recipe.workers, self.team.local_size),
        )  # fmt: skip

    @property
    def source_only(self) -> Trial:
        """The model that is not adapted."""
        return Trial(SOURCE_ONLY, self.load_base)

    def load_base(self) -> nn.Module:
        """Source-only's model, on the device."""
        # What this run has made itself names the code that the recipe names.
        own = self.recipe.data is not None
        model, _ = load_bundle(self.base, trust_code=self.recipe.trust_code or own)
        return model.to(self.team.device)


def adapt(recipe: FinetuneRecipe, team: Team, finetune: Finetune) -> Outcome:
    """Adapt a model to a target domain without its labels; the same call goes on where it stopped.

    Args:
        recipe: with ``adapt.method``.
        team: the processes; called by all together.
        finetune: trains without adaptation.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    assert recipe.adapt.method is not None
    find_adaptation(recipe.adapt.method)  # a wrong name is said now, not after source-only
    check_scorers(recipe.adapt.scorers)
    inputs, folder = open_finetune(recipe, team)
    if folder.finished:
        return outcome_of(folder, f"{folder.path} is finished already.")
    with recorded(folder, team.is_main), stop_on_signals() as stop:
        begin = time.perf_counter()
        base = _train_source_only(recipe, inputs, team, finetune)
        run = _Run(recipe, team, folder, inputs, stop, base, begin)
        if recipe.adapt.method == "adabn":
            _adapt_statistics(run)
        else:
            _adapt_weights(run)
    return outcome_of(folder)


def _train_source_only(recipe: FinetuneRecipe, inputs: Inputs, team: Team, finetune: Finetune) -> Path:
    """The bundle of the same fine-tuning without the target: a run of its own, inside this one's folder."""
    if recipe.data is None:
        return find_bundle(recipe.model)
    plain = recipe.replace(adapt=AdaptRecipe(), out=recipe.out / SOURCE_ONLY)
    if recipe.adapt.source_only is not None:
        _check_source_only(recipe.adapt.source_only, plain, inputs)
        return recipe.adapt.source_only / BUNDLE
    say("source-only first: the same training without the target")
    finetune(plain, team)
    return plain.out / BUNDLE


def _check_source_only(path: Path, plain: FinetuneRecipe, inputs: Inputs) -> None:
    """`RecipeError` where a run is not what would be trained here: then it is no measure of adaptation."""
    if RunFolder(path, "finetune").summary.get("status") != "done":
        raise RecipeError(f"adapt.source_only={path}: no finished run. Give one, or leave it out.")
    check_same_run(path, FinetuneRecipe.make(**read_yaml(path / RECIPE)), plain)
    before = read_json(path / INPUTS, RecipeError, "record of a run's inputs")
    for name, value in inputs.fingerprints().items():
        if name != "target" and before.get(name) != value:
            raise RecipeError(f"adapt.source_only={path}: was made with other {name}. Leave it out.")


def _adapt_weights(run: _Run) -> None:
    """Train with the method's loss: source-free from source-only on, else from where that began."""
    recipe, team, inputs = run.recipe, run.team, run.inputs
    if recipe.adapt.is_source_free:
        inputs = on_the_target(recipe, inputs, run.base)
    journal = Journal(run.folder, recipe.track or (), recipe.model_dump(mode="json"), team)
    with closing(journal), own_threads():
        job, work, _ = learn(prepare(recipe, team, journal, inputs, run.stop), guarded=False)
        trials = [run.source_only, *_epochs(job)]
        choice = settle(run.bench, trials)
        notes = unseal(run.bench, trials, choice)
        chosen = next(trial for trial in trials if trial.name == choice["chosen"])
        seconds = time.perf_counter() - run.begin
        if choice["promoted"]:
            _finish_adapted(job, work, chosen, seconds, notes)
        else:
            _keep_source_only(run, seconds, {"steps": job.state.position.step, **notes})


def _epochs(job: Job) -> list[Trial]:
    """The ends of epochs whose checkpoints were kept; with ``select=last`` the last alone."""
    asked = job.recipe.adapt.candidates if job.recipe.select == "best" else 1
    found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(job.state.checkpoints)}
    trials = []
    for epoch, step in candidate_steps(asked, job.state.epochs, job.state.epoch_steps).items():
        if step in found:
            trials.append(Trial(f"epoch-{epoch}", _loader(job, found[step]), step))
        else:
            warn(f"the checkpoint of epoch {epoch} is not there: it cannot be chosen")
    return trials


def _loader(job: Job, checkpoint: Checkpoint) -> Callable[[], nn.Module]:
    def load() -> nn.Module:
        job.model.load_state_dict(checkpoint.result(), strict=False)
        return job.model

    return load


def _finish_adapted(
    job: Job, work: Work | None, chosen: Trial, seconds: float, notes: dict[str, Any]
) -> None:
    found = {checkpoint.step: checkpoint for checkpoint in list_checkpoints(job.state.checkpoints)}
    assert chosen.step is not None
    finish(job, work, Guards(None, None), seconds, checkpoint=found[chosen.step], notes=notes)


def _adapt_statistics(run: _Run) -> None:
    """AdaBN (Li et al., arXiv:1603.04779): the BatchNorm statistics of the target in the place of the
    source's; no weight moves."""
    recipe, inputs = run.recipe, run.inputs
    assert inputs.target is not None
    model = run.load_base()
    if not batchnorm_layers(model):
        raise ModelError(
            f"adapt.method=adabn: {recipe.model} has no BatchNorm layer with statistics to adapt. Use "
            f"another method, such as mcc."
        )
    ledger = Ledger(inputs.target, run.folder.path / LEDGER)
    reestimate(
        model, inputs.how, inputs.target, run.team, ledger,
        batch_size=recipe.batch_size, seed=recipe.seed, workers=run.bench.workers,
    )  # fmt: skip
    trials: Sequence[Trial] = [run.source_only, Trial("adabn", lambda: model)]
    choice = settle(run.bench, trials)
    notes = unseal(run.bench, trials, choice)
    seconds = time.perf_counter() - run.begin
    if choice["promoted"]:
        _save(run, model, seconds, {"steps": 0, **notes})
    else:
        _keep_source_only(run, seconds, {"steps": 0, **notes})


def _keep_source_only(run: _Run, seconds: float, notes: dict[str, Any]) -> None:
    """The bundle is source-only's: what was adapted is not better, as far as can be told."""
    _save(run, run.load_base(), seconds, notes)


def _save(run: _Run, model: nn.Module, seconds: float, notes: dict[str, Any]) -> None:
    """Write ``RUN/bundle`` and ``RUN/summary.json``, of a model described as source-only's."""
    _, config = read_bundle(run.base)
    assert run.inputs.target is not None
    adaptation = {"adapted_to": run.inputs.target.name, "method": run.recipe.adapt.method}
    described = replace(
        config,
        lineage={**config.lineage, **adaptation, "chosen": notes["adaptation"]["chosen"]},
    )

    def write() -> None:
        saved = save_bundle(run.folder.path / BUNDLE, model, described)
        before = RunFolder(run.base.parent, "finetune").summary if run.recipe.data else {}
        run.folder.write_summary(
            "done",
            bundle=BUNDLE,
            identity=saved.identity,
            seconds=round(seconds, 2),
            processes=run.team.size,
            precision=before.get("precision"),
            train_images=before.get("train_images"),
            selected_step=None,
            validation=None if notes["adaptation"]["promoted"] else before.get("validation"),
            **notes,
        )

    run.team.on_main(write)
