"""The end of a fine-tuning: choose the weights, prove what was frozen, measure, write bundle and summary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from tldist.data.loader import load_batches
from tldist.errors import ModelError
from tldist.finetune.adapted_words import adaptation_values, adaptation_words
from tldist.finetune.guards import Guards, below_probe
from tldist.finetune.job import Job
from tldist.finetune.stage import Work
from tldist.finetune.sweep import best_probe, narrow, sweep_settings, sweep_table
from tldist.models.load import hash_tensors, input_tensor, save_bundle
from tldist.progress import warn
from tldist.runs import BUNDLE, Outcome, RunFolder
from tldist.training.calibrate import calibrate
from tldist.training.checkpoint import Checkpoint
from tldist.training.ledger import LEDGER
from tldist.training.measure import Measurement


def finish(
    job: Job,
    work: Work | None,
    guards: Guards,
    seconds: float,
    *,
    checkpoint: Checkpoint | None = None,
    notes: dict[str, Any] | None = None,
) -> None:
    """Write ``RUN/bundle`` and ``RUN/summary.json``; called by all processes together.

    Args:
        job: the fine-tuning, all steps taken.
        work: of its last phase; None where nothing was left to do.
        guards: what was found before the first step.
        seconds: that it took.
        checkpoint: whose weights are the result; None: as the recipe's ``select`` says.
        notes: more for the summary.

    Raises:
        ModelError: a frozen tensor has changed.
    """
    step = _select(job, checkpoint)
    frozen = prove_frozen(job)
    lora = job.adapters.merge(_some_inputs(job)) if job.adapters else None
    validation, sweep = _measure_result(job, work) if job.inputs.validation else (None, None)
    broken = job.state.ledger.settle(job.team)
    metrics = {"val_accuracy": validation.accuracy, "val_loss": validation.loss} if validation else {}
    if validation and job.inputs.train.is_multilabel:
        metrics["val_mean_average_precision"] = validation.score
    calibration = calibrate(validation) if validation and job.recipe.calibrate else None
    config = replace(
        job.inputs.start.config,
        metrics=metrics,
        lineage=_lineage(job),
        temperature=calibration["temperature"] if calibration else 1.0,
    )

    def write() -> None:
        saved = save_bundle(job.folder.path / BUNDLE, job.model, config)
        job.folder.write_summary(
            "done",
            bundle=BUNDLE,
            identity=saved.identity,
            steps=job.state.position.step,
            selected_step=step,
            seconds=round(seconds, 2),
            processes=job.team.size,
            precision=job.numerics.precision,
            channels_last=job.numerics.channels_last,
            train_images=len(job.inputs.train),
            broken_images=broken,
            frozen=frozen,
            lora=lora,
            linear_probe=guards.probe,
            duplicates=guards.duplicates,
            validation=validation.to_dict() if validation else None,
            calibration=calibration,
            sweep=sweep,
            **(notes or {}),
        )

    job.team.on_main(write)


def _select(job: Job, checkpoint: Checkpoint | None) -> int:
    """Load the weights that become the bundle; returns the step that they are from."""
    checkpoint = checkpoint or job.state.kept(job.recipe.select == "best")
    job.model.load_state_dict(checkpoint.result(), strict=False)
    return checkpoint.step


def _measure_result(job: Job, work: Work | None) -> tuple[Measurement, list[dict[str, Any]] | None]:
    """Measure what is kept; of a sweep, choose the probe first and make it the head.

    From the cached features where there are some, else in fp32, as the bundle computes elsewhere.

    Returns:
        The measurement, and what each probe of a sweep reached.
    """
    label = "validate the result"
    cached = work is not None and work.part is not None

    def measured(probe: int | None, keep_logits: bool) -> Measurement:
        if work is not None and cached:
            return work.measure(job, label, keep_logits=keep_logits, probe=probe)
        return job.measure("fp32", label, keep_logits=keep_logits, probe=probe)

    if not job.recipe.sweep.is_on:
        return measured(None, True), None
    found = [measured(place, False) for place in range(len(sweep_settings(job.recipe)))]
    chosen = best_probe(found)
    result = measured(chosen, True)
    narrow(job.model, job.blocks[-1], chosen)
    return result, sweep_table(job.recipe, found)


def prove_frozen(job: Job) -> dict[str, Any]:
    """The hash of what was frozen, before and after.

    Raises:
        ModelError: it has changed.
    """
    after = hash_tensors(job.model.state_dict(), job.frozen_names)
    if after != job.frozen_before:
        raise ModelError(
            "a frozen tensor has changed while training: the model writes to itself in eval mode."
        )
    return {"tensors": len(job.frozen_names), "before": job.frozen_before, "after": after, "equal": True}


def _some_inputs(job: Job) -> Tensor:
    """A few training images as the model's input."""
    some = [np.arange(min(8, len(job.inputs.train)))]
    batch = next(iter(load_batches(job.inputs.train, some, job.inputs.how)))
    return input_tensor(batch.images.to(job.team.device), job.inputs.how, job.numerics.memory_format)


def _lineage(job: Job) -> dict[str, Any]:
    domain = job.inputs.train
    return {
        "stage": "finetune",
        **job.inputs.start.config.lineage,
        "data": domain.name,
        "data_fingerprint": domain.fingerprint,
        **({"adapted_to": job.inputs.target.name} if job.inputs.target else {}),
        "train_images": len(domain),
        "recipe": job.recipe.model_dump(mode="json"),
    }


def outcome_of(folder: RunFolder, note: str = "") -> Outcome:
    """What a finished run has to say."""
    summary = folder.summary
    validation = summary.get("validation")
    lines = [note] if note else []
    if summary.get("sweep"):
        probes, best = len(summary["sweep"]), summary["sweep"][0]
        lines.append(f"best of {probes} probes: lr {best['lr']:g}, weight decay {best['weight_decay']:g}")
    if validation:
        score = validation.get("mean_average_precision")
        words = (
            f"accuracy {validation['accuracy']:.4f}"
            if score is None
            else f"mean average precision {score:.4f}"
        )
        lines.append(f"validation {words} on {validation['count']:,} images")
        below = below_probe(validation["accuracy"], summary.get("linear_probe"))
        if below:
            lines.append(f"warning: that is {below}.")
    lines += adaptation_words(summary)
    if summary.get("broken_images"):
        warn(f"{summary['broken_images']} broken images were skipped: {folder.path / LEDGER}")
    bundle = folder.path / BUNDLE
    values = {
        "bundle": str(bundle),
        "accuracy": validation["accuracy"] if validation else None,
        **{name: summary.get(name) for name in ("steps", "seconds", "processes", "precision")},
        "linear_probe": (summary.get("linear_probe") or {}).get("accuracy"),
        "duplicates": summary.get("duplicates"),
        **adaptation_values(summary),
    }
    following = f"tldist export {bundle} profile=cpu-fp32 out={folder.path}/package"
    return Outcome("finetune", folder.path, values, "\n".join(lines), following)
