"""What a fusion is about to do, said before it starts."""

from __future__ import annotations

from typing import Any

from tldist.domain import Domain
from tldist.fuse.job import Job
from tldist.models.description import architecture_name
from tldist.progress import show_plan, warn


def show_job(job: Job) -> None:
    """Print models, classes and domains; warn where nothing will be measured."""
    names = sorted({architecture_name(parent.config.model) for parent in job.everyone})
    rows: dict[str, Any] = {
        "method": job.recipe.method,
        "models": f"{len(job.everyone)} of {', '.join(names)}",
    }
    if job.base:
        rows["base"] = job.base.label
    for number, (parent, weight) in enumerate(zip(job.parents, job.settings.weights), 1):
        source = f", trained on {job.sources[number - 1].name}" if job.sources else ""
        rows[f"model {number}"] = f"{parent.label}, weight {weight:g}{source}"
    for place, line in enumerate(job.labels.shown()):
        rows["classes" if place == 0 else " " * place] = line
    rows["data"] = _counted(job.data)
    if job.validation is not job.test:
        rows["chosen on"] = _counted(job.validation)
    show_plan(
        "fuse",
        {
            **rows,
            "measured on": _counted(job.test) if job.test else "nothing",
            "processes": f"{job.team.size} on {job.team.device.type}, {job.workers} decoding workers each",
            "out": job.recipe.out,
        },
    )
    if job.data is not None and job.test is None:
        warn(f"nothing is measured on {job.data.name}: it has no labels")


def _counted(domain: Domain | None) -> str:
    return f"{domain.name}: {len(domain):,} images" if domain else "none"
