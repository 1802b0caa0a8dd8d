"""What a fine-tuning is about to do, for a person to read before it starts."""

from __future__ import annotations

import torch

from tldist.finetune.frozen import FrozenPart
from tldist.finetune.job import Job
from tldist.finetune.phases import Phase
from tldist.models.blocks import freeze
from tldist.models.description import architecture_name
from tldist.progress import show_plan
from tldist.training.memory import MemoryEstimate, estimate_memory

Planned = tuple[Phase, FrozenPart | None, str]
"""A phase, its frozen part where that is computed once, and how often it is computed, in words."""


def show_job(job: Job, planned: list[Planned]) -> None:
    """Print the plan."""
    recipe, team, inputs, start = job.recipe, job.team, job.inputs, job.inputs.start
    held = (
        f"{len(inputs.validation):,} to choose the best" if inputs.validation else "the last weights are kept"
    )
    threads = "1 thread" if job.threads == 1 else f"{job.threads} threads"
    several = ", any number an image" if inputs.train.is_multilabel else ""
    layout = ", channels_last" if job.numerics.channels_last else ""
    how = start.config.preprocessing
    rows = {
        "model": f"{architecture_name(start.config.model)}, weights {recipe.weights}, "
        f"input {how.height}x{how.width}",
        "learns": "; then ".join(_phase_words(job, phase) for phase, _, _ in planned),
        "frozen part": "; then ".join(f"computed {words}" for _, _, words in planned if words),
        "classes": f"{len(inputs.classes)}{several} ({start.known_rows} known to the model by name)",
        "images": f"{len(inputs.train):,} to learn from, {held}",
        "adapts": _adapts(job),
        "steps": f"{job.state.total_steps:,} of {recipe.batch_size} images ({job.state.epochs} epochs)",
        "processes": f"{team.size} on {team.device.type}, each with {threads} and {job.workers} to decode",
        "precision": f"{job.numerics.precision}{layout} ({job.numerics.reason})",
        "memory": max((_memory(job, phase, part) for phase, part, _ in planned), key=lambda m: m.total),
        "out": recipe.out,
    }
    show_plan("finetune", {name: words for name, words in rows.items() if words != ""})


def _adapts(job: Job) -> str:
    """How, and to what; nothing where it does not."""
    if job.adaptation is None or job.recipe.adapt.target is None:
        return ""
    settings, target = job.recipe.adapt, job.adaptation.target
    labels = "sealed" if job.recipe.adapt.target.labels == "sealed" else "USED to choose"
    return (
        f"{settings.method}, weight {job.adaptation.weight:g}, to {len(target):,} images of {target.name}, "
        f"whose labels are {labels}"
    )


def _memory(job: Job, phase: Phase, part: FrozenPart | None) -> MemoryEstimate:
    """Of a step of a phase; activation checkpointing needs less."""
    recipe, how, team = job.recipe, job.inputs.how, job.team
    freeze(job.model, job.learning[phase])
    shape = part.shape if part else (3, how.height, how.width)
    formats = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return estimate_memory(
        job.model,
        part.suffix if part else job.model,
        torch.zeros(1, *shape, device=team.device),
        images=-(-recipe.batch_size // (team.size * recipe.gradient_accumulation)),
        optimizer=recipe.optimizer.name,
        averaged=job.average is not None,
        autocast=formats.get(job.numerics.precision),
        shards=team.size if team.shards else 1,
    )


def _phase_words(job: Job, phase: Phase) -> str:
    learning = job.learning[phase]
    everything = sum(p.numel() for p in job.model.parameters())
    learns = sum(p.numel() for n, p in job.model.named_parameters() if any(b.owns(n) for b in learning))
    epochs = "" if len(job.phases) == 1 else f" for {phase.last_epoch - phase.first_epoch} epochs"
    return f"{phase.train}: {learns:,} of {everything:,} parameters{epochs}"
