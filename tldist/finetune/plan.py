"""What a fine-tuning is about to do, for a person to read before it starts."""

from __future__ import annotations

from tldist.finetune.prepare import Job
from tldist.models.description import architecture_name
from tldist.progress import show_plan


def show_job(job: Job) -> None:
    """Print the plan."""
    recipe, team, inputs, start = job.recipe, job.team, job.inputs, job.inputs.start
    learning = sum(p.numel() for p in job.model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in job.model.parameters())
    held = (
        f"{len(inputs.validation):,} to choose the best" if inputs.validation else "the last weights are kept"
    )
    layout = ", channels_last" if job.numerics.channels_last else ""
    how = start.config.preprocessing
    rows = {
        "model": f"{architecture_name(start.config.model)}, weights {recipe.weights}, "
        f"input {how.height}x{how.width}",
        "learns": f"{recipe.train}: {learning:,} of {everything:,} parameters",
        "frozen part": f"computed {job.frozen_words}",
        "classes": f"{len(inputs.classes)} ({start.known_rows} known to the model by name)",
        "images": f"{len(inputs.train):,} to learn from, {held}",
        "steps": f"{job.state.total_steps:,} of {recipe.batch_size} images ({recipe.epochs} epochs)",
        "processes": f"{team.size} on {team.device.type}, {job.workers} decoding workers each",
        "precision": f"{job.numerics.precision}{layout} ({job.numerics.reason})",
        "out": recipe.out,
    }
    if not job.frozen_words:
        del rows["frozen part"]
    show_plan("finetune", rows)
