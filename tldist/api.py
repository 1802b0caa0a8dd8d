"""The stages as Python functions: the same settings as on the command line, as keywords.

Nested settings are mappings: ``finetune(data={"path": "photos", "limit": 100}, optimizer={"lr": 1e-3})``.
Each returns an `Outcome`; a mistake raises a `tldist.errors.TldistError`.
"""

from __future__ import annotations

from typing import Any

from tldist.runs import Outcome
from tldist.stages import run_stage

__all__ = ["Outcome", "align", "bench", "embed", "evaluate", "export", "finetune", "fuse", "parity", "report"]


def finetune(**settings: Any) -> Outcome:
    """Fit a pre-trained model to a target domain (`tldist.finetune.recipe.FinetuneRecipe`)."""
    return run_stage("finetune", **settings)


def evaluate(**settings: Any) -> Outcome:
    """Measure a bundle or a package on a labelled domain (`tldist.evaluate.recipe.EvaluateRecipe`)."""
    return run_stage("evaluate", **settings)


def fuse(**settings: Any) -> Outcome:
    """Merge several bundles into one (`tldist.fuse.recipe.FuseRecipe`)."""
    return run_stage("fuse", **settings)


def align(**settings: Any) -> Outcome:
    """Map source and target features into a common space (`tldist.align.recipe.AlignRecipe`)."""
    return run_stage("align", **settings)


def export(**settings: Any) -> Outcome:
    """Turn a bundle into an ONNX package (`tldist.export.recipe.ExportRecipe`)."""
    return run_stage("export", **settings)


def parity(**settings: Any) -> Outcome:
    """Compare a package with its bundle or its stored samples (`tldist.export.recipe.ParityRecipe`)."""
    return run_stage("parity", **settings)


def bench(**settings: Any) -> Outcome:
    """Time a package against PyTorch on this machine (`tldist.bench.recipe.BenchRecipe`)."""
    return run_stage("bench", **settings)


def embed(**settings: Any) -> Outcome:
    """Turn a domain into shards of vectors (`tldist.embed.recipe.EmbedRecipe`)."""
    return run_stage("embed", **settings)


def report(**settings: Any) -> Outcome:
    """Write one HTML page about runs and packages (`tldist.report.recipe.ReportRecipe`)."""
    return run_stage("report", **settings)
