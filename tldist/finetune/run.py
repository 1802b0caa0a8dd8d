"""Fine-tune: load, build, prepare, train, save."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tldist import distributed
from tldist.data.augment import Augmentation
from tldist.data.loader import load_batches, num_workers
from tldist.data.order import plan_steps, seed_of, steps_per_epoch
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import ModelError, Preempted
from tldist.files import canonical_json, sha256_text
from tldist.finetune.domains import split_domains
from tldist.finetune.recipe import FinetuneRecipe
from tldist.models.blocks import Block, cut_blocks, freeze, trainable_blocks
from tldist.models.description import architecture_name
from tldist.models.load import Start, save_bundle, start_model
from tldist.progress import progress_bar, say, show_plan, warn
from tldist.runs import BUNDLE, CHECKPOINTS, Outcome, RunFolder, open_run, recorded
from tldist.training.checkpoint import (
    MODEL,
    Checkpoint,
    Position,
    list_checkpoints,
    newest_checkpoint,
    restore,
    retain,
    save_checkpoint,
)
from tldist.training.ledger import LEDGER, Ledger
from tldist.training.loop import Learner, Step, cross_entropy, train
from tldist.training.measure import Measurement, measure, predictor
from tldist.training.optim import build_optimizer, learning_rate
from tldist.training.precision import Numerics, settle_numerics
from tldist.training.signals import StopFlag, stop_on_signals

LOG_LINES = 200
"""About how many lines of training loss a run writes."""


@dataclass
class Job:
    """Everything that a fine-tuning works with, once it is prepared."""

    recipe: FinetuneRecipe
    team: Team
    folder: RunFolder
    train: Domain
    validation: Domain | None
    classes: tuple[str, ...]
    start: Start
    numerics: Numerics
    learner: Learner
    position: Position
    ledger: Ledger
    workers: int
    frozen_names: list[str]
    frozen_before: str

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints lie."""
        return self.folder.path / CHECKPOINTS

    @property
    def epoch_steps(self) -> int:
        """Steps of one epoch."""
        return steps_per_epoch(len(self.train), self.recipe.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.epoch_steps * self.recipe.epochs


def run(recipe: FinetuneRecipe) -> Outcome:
    """Fine-tune a model; the same call goes on where it stopped.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    team = distributed.start()
    distributed.check_precision(recipe.precision, team.device)
    domain, validation, classes = split_domains(recipe.data, recipe.validation, recipe.seed)
    torch.manual_seed(seed_of("init", recipe.seed))
    start = start_model(
        recipe.model,
        recipe.weights,
        classes,
        image_size=recipe.image_size,
        new_head=recipe.head == "new",
        trust_code=recipe.trust_code,
    )
    inputs = {"data": _data_identity(domain, validation), "model": _hash_tensors(start.model, None)}
    team.same_everywhere("the data or the model", canonical_json(inputs))
    folder = team.on_main(lambda: open_run("finetune", recipe.out, recipe, inputs))
    if folder.finished:
        return _outcome(folder, f"{folder.path} is finished already.")
    with recorded(folder, team.is_main), stop_on_signals() as stop:
        job = _prepare(recipe, team, folder, domain, validation, classes, start)
        _show(job)
        begin = time.perf_counter()
        _train(job, stop)
        return _finish(job, time.perf_counter() - begin)


def _prepare(
    recipe: FinetuneRecipe,
    team: Team,
    folder: RunFolder,
    domain: Domain,
    validation: Domain | None,
    classes: tuple[str, ...],
    start: Start,
) -> Job:
    """Freeze, choose the numerics, wrap by Accelerate, go on from the newest checkpoint."""
    model, how = start.model, start.config.preprocessing
    learning = trainable_blocks(cut_blocks(model), recipe.train)
    frozen = freeze(model, learning)
    frozen_names = _frozen_names(model, learning)
    per_process = -(-recipe.batch_size // (team.size * recipe.gradient_accumulation))
    numerics = settle_numerics(
        recipe.precision,
        folder.path / "precision.json",
        model,
        frozen,
        (how.height, how.width),
        team,
        per_process,
    )
    memory = torch.channels_last if numerics.channels_last else torch.contiguous_format
    model.to(memory_format=memory)
    optimizer = build_optimizer(
        model, **recipe.optimizer.model_dump(include={"name", "lr", "weight_decay", "momentum"})
    )
    accelerator = team.accelerator(numerics.precision)
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    total_samples = len(domain) * recipe.epochs
    learner = Learner(
        model=model,
        wrapped=wrapped,
        optimizer=wrapped_optimizer,
        accelerator=accelerator,
        team=team,
        frozen=frozen,
        objective=cross_entropy(recipe.label_smoothing),
        how=how,
        memory_format=memory,
        learning_rate=lambda samples: learning_rate(
            samples, total_samples, recipe.optimizer.lr, recipe.optimizer.warmup, recipe.optimizer.schedule
        ),
        seed=recipe.seed,
        pieces=recipe.gradient_accumulation,
        clip=recipe.optimizer.clip,
    )
    frozen_before = _hash_tensors(model, frozen_names)
    position = _resume(team, folder, learner, optimizer)
    ledger = Ledger(domain, folder.path / LEDGER)
    ledger.found = {int(index): reason for index, reason in position.broken.items()}
    return Job(
        recipe, team, folder, domain, validation, classes, start, numerics, learner, position, ledger,
        num_workers(recipe.workers, team.local_size), frozen_names, frozen_before,
    )  # fmt: skip


def _resume(team: Team, folder: RunFolder, learner: Learner, optimizer: torch.optim.Optimizer) -> Position:
    checkpoints = folder.path / CHECKPOINTS
    found = team.on_main(lambda: newest_checkpoint(checkpoints) if checkpoints.is_dir() else None)
    if found is None:
        team.on_main(lambda: folder.rewind_metrics(0))
        return Position()
    position = restore(found, learner.model, optimizer)
    if learner.accelerator.scaler is not None and position.scaler:
        learner.accelerator.scaler.load_state_dict(position.scaler)
    team.on_main(lambda: folder.rewind_metrics(position.step))
    say(f"goes on after step {position.step:,} ({found.path})")
    return position


def _show(job: Job) -> None:
    recipe, team = job.recipe, job.team
    learning = sum(p.numel() for p in job.learner.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in job.learner.model.parameters())
    validation = f"{len(job.validation):,} to choose the best" if job.validation else "none: the last is kept"
    layout = ", channels_last" if job.numerics.channels_last else ""
    show_plan(
        "finetune",
        {
            "model": f"{architecture_name(job.start.config.model)}, weights {recipe.weights}, "
            f"input {job.learner.how.height}x{job.learner.how.width}",
            "learns": f"{recipe.train}: {learning:,} of {everything:,} parameters",
            "classes": f"{len(job.classes)} ({job.start.known_rows} known to the model by name)",
            "images": f"{len(job.train):,} to learn from, {validation}",
            "steps": f"{job.total_steps:,} of {recipe.batch_size} images ({recipe.epochs} epochs)",
            "processes": f"{team.size} on {team.device.type}, {job.workers} decoding workers each",
            "precision": f"{job.numerics.precision}{layout} ({job.numerics.reason})",
            "out": recipe.out,
        },
    )


def _train(job: Job, stop: StopFlag) -> None:
    """All steps that are left, with what happens once in a while: log, measure, save, stop."""
    recipe, team, position = job.recipe, job.team, job.position
    if position.step >= job.total_steps:
        return
    augmentation = Augmentation(**recipe.augment.model_dump())
    plans = plan_steps(
        size=len(job.train),
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        epochs=recipe.epochs,
        first_step=position.step,
        rank=team.rank,
        ranks=team.size,
    )
    batches = load_batches(
        job.train,
        plans,
        job.learner.how,
        classes=job.classes,
        augmentation=augmentation,
        seed=recipe.seed,
        workers=job.workers,
    )
    window = _Window(team, max(1, job.total_steps // LOG_LINES))
    total_samples = len(job.train) * recipe.epochs
    with progress_bar(total_samples, "img", "finetune", position.samples) as bar:
        for step in train(job.learner, _noting(batches, job.ledger), position.samples, stop):
            bar.update(step.samples - position.samples)
            position.step, position.samples = step.number, step.samples
            line = window.add(step)
            if line and team.is_main:
                job.folder.log(**line)
                bar.set_postfix_str(f"loss {line['loss']:.3f}", refresh=False)
            epoch_ends = step.number % job.epoch_steps == 0
            if epoch_ends:
                job.ledger.settle(team)
                _measure_epoch(job, step)
            stopping = bool(step.counts[1] > 0)
            every = recipe.checkpoint.every_steps
            if epoch_ends or stopping or (every and step.number % every == 0):
                _save(job)
            if stopping and step.number < job.total_steps:
                raise Preempted(
                    f"told to stop; saved after step {step.number:,} of {job.total_steps:,} in "
                    f"{job.folder.path}. The same command goes on there."
                )


def _noting(batches: Iterable[Any], ledger: Ledger) -> Iterable[Any]:
    for batch in batches:
        ledger.add(batch.broken)
        yield batch


class _Window:
    """Mean loss and rate of the steps since the last log line, over all processes."""

    def __init__(self, team: Team, every: int) -> None:
        self.team, self.every = team, every
        self._reset()

    def _reset(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.counts: list[torch.Tensor] = []
        self.begin = time.perf_counter()

    def add(self, step: Step) -> dict[str, Any] | None:
        """A log line when one is due; called by all processes together."""
        self.losses.append(step.loss_sum)
        self.counts.append(step.counts[0])
        if step.number % self.every:
            return None
        loss = self.team.sum(torch.stack(self.losses).sum())
        count = float(torch.stack(self.counts).sum())
        rate = count / (time.perf_counter() - self.begin)
        self._reset()
        return {
            "step": step.number,
            "epoch": step.epoch + 1,
            "samples": step.samples,
            "loss": float(loss) / max(1.0, count),
            "lr": step.lr,
            "images_per_second": round(rate, 2),
        }


def _measure_epoch(job: Job, step: Step) -> None:
    """Measure on validation and remember the best."""
    if job.validation is None:
        return
    found = _measure(job, job.validation, job.numerics, f"validate {step.epoch + 1}/{job.recipe.epochs}")
    best = job.position.best
    if best is None or (found.accuracy, -found.loss) > (best["accuracy"], -best["loss"]):
        job.position.best = {"step": step.number, "accuracy": found.accuracy, "loss": found.loss}
    if job.team.is_main:
        job.folder.log(
            step=step.number, epoch=step.epoch + 1, val_accuracy=found.accuracy, val_loss=found.loss
        )


def _measure(job: Job, domain: Domain, numerics: Numerics, label: str) -> Measurement:
    job.team.same_buffers(job.learner.model)
    predict = predictor(
        job.learner.model, job.learner.how, precision=numerics.precision, channels_last=numerics.channels_last
    )
    return measure(predict, domain, job.classes, job.learner.how, job.team, workers=job.workers, label=label)


def _save(job: Job) -> Checkpoint:
    """Save on the main process while the others wait; keep the newest and the best."""
    position = job.position
    position.broken = {str(index): reason for index, reason in job.ledger.found.items()}
    if job.learner.accelerator.scaler is not None:
        position.scaler = job.learner.accelerator.scaler.state_dict()

    def save() -> Checkpoint:
        optimizer = getattr(job.learner.optimizer, "optimizer", job.learner.optimizer)
        saved = save_checkpoint(job.checkpoints, job.learner.model, optimizer, position)
        retain(job.checkpoints, job.recipe.checkpoint.keep, _best_step(position))
        return saved

    return job.team.on_main(save)


def _best_step(position: Position) -> int | None:
    return int(position.best["step"]) if position.best else None


def _finish(job: Job, seconds: float) -> Outcome:
    """Choose the weights, prove the frozen part, measure once in fp32, write bundle and summary."""
    best = _best_step(job.position)
    if job.recipe.select == "best" and best is not None and best != job.position.step:
        checkpoint = next(found for found in list_checkpoints(job.checkpoints) if found.step == best)
        job.learner.model.load_state_dict(checkpoint.tensors(MODEL))
    frozen = _prove_frozen(job)
    plain = replace(job.numerics, precision="fp32")
    validation = _measure(job, job.validation, plain, "validate the result") if job.validation else None
    broken = job.ledger.settle(job.team)
    metrics = {"val_accuracy": validation.accuracy, "val_loss": validation.loss} if validation else {}
    config = replace(job.start.config, metrics=metrics, lineage=_lineage(job))

    def write() -> None:
        saved = save_bundle(job.folder.path / BUNDLE, job.learner.model, config)
        job.folder.write_summary(
            "done",
            bundle=BUNDLE,
            identity=saved.identity,
            steps=job.position.step,
            selected_step=best if job.recipe.select == "best" and best is not None else job.position.step,
            seconds=round(seconds, 2),
            processes=job.team.size,
            precision=job.numerics.precision,
            channels_last=job.numerics.channels_last,
            train_images=len(job.train),
            broken_images=broken,
            frozen=frozen,
            validation=validation.to_dict() if validation else None,
        )

    job.team.on_main(write)
    return _outcome(job.folder, "")


def _prove_frozen(job: Job) -> dict[str, Any]:
    """The hash of what was frozen, before and after."""
    after = _hash_tensors(job.learner.model, job.frozen_names)
    if after != job.frozen_before:
        raise ModelError(
            "a frozen tensor has changed while training; the model writes to itself in eval mode."
        )
    return {"tensors": len(job.frozen_names), "before": job.frozen_before, "after": after, "equal": True}


def _outcome(folder: RunFolder, note: str) -> Outcome:
    summary = folder.summary
    validation = summary.get("validation")
    lines = [note] if note else []
    if validation:
        lines.append(f"validation accuracy {validation['accuracy']:.4f} on {validation['count']:,} images")
    if summary.get("broken_images"):
        lines.append(f"{summary['broken_images']} broken images were skipped: {folder.path / LEDGER}")
        warn(lines[-1])
    bundle = folder.path / BUNDLE
    values = {
        "bundle": str(bundle),
        "accuracy": validation["accuracy"] if validation else None,
        "steps": summary.get("steps"),
        "seconds": summary.get("seconds"),
        "processes": summary.get("processes"),
        "precision": summary.get("precision"),
    }
    following = f"tldist export {bundle} profile=cpu-fp32 out={folder.path}/package"
    return Outcome("finetune", folder.path, values, "\n".join(lines), following)


def _lineage(job: Job) -> dict[str, Any]:
    return {
        "stage": "finetune",
        **job.start.config.lineage,
        "data": job.train.name,
        "data_fingerprint": job.train.fingerprint,
        "train_images": len(job.train),
        "recipe": job.recipe.model_dump(mode="json"),
    }


def _data_identity(train_domain: Domain, validation: Domain | None) -> str:
    return sha256_text(train_domain.fingerprint + (validation.fingerprint if validation else ""))


def _frozen_names(model: nn.Module, learning: list[Block]) -> list[str]:
    """Names of parameters and buffers outside the learning blocks."""
    return [name for name in model.state_dict() if not any(block.owns(name) for block in learning)]


def _hash_tensors(model: nn.Module, names: list[str] | None) -> str:
    """SHA-256 over the named tensors of a model (None: all), names included."""
    state = model.state_dict()
    digest = hashlib.sha256()
    for name in sorted(state if names is None else names):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
