"""The table of stages: name, what it does, where its recipe and its work are. Imports none of them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from tldist.errors import RecipeError, close_matches

if TYPE_CHECKING:
    from tldist.recipe import Recipe
    from tldist.runs import Outcome


@dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        sentence: its line in ``tldist --help``.
        usage: its inputs and main settings, as typed.
        recipe: ``module:class`` of the settings (imports no torch).
        work: ``module:function`` that takes the recipe and returns an `Outcome`.
        extra: the extra of tldist that it needs, if any.
        distributed: whether several processes share its work.
    """

    sentence: str
    usage: str
    recipe: str
    work: str
    extra: str | None = None
    distributed: bool = False


STAGES: dict[str, Stage] = {
    "finetune": Stage(
        "fit a pre-trained model to a target domain",
        "[RECIPE.yaml] data=D model=M [weights=W] out=RUN",
        "tldist.finetune.recipe:FinetuneRecipe",
        "tldist.finetune.run:run",
        "train",
        distributed=True,
    ),
    "evaluate": Stage(
        "measure a bundle or a package on a labelled domain",
        "MODEL data=D",
        "tldist.evaluate.recipe:EvaluateRecipe",
        "tldist.evaluate.run:run",
        "train",
        distributed=True,
    ),
    "fuse": Stage(
        "merge several bundles into one",
        "BUNDLE BUNDLE ... method=NAME out=RUN [base=BUNDLE] [data=D]",
        "tldist.fuse.recipe:FuseRecipe",
        "tldist.fuse.run:run",
        "train",
        distributed=True,
    ),
    "align": Stage(
        "map source and target features into a common space",
        "BUNDLE source=D target=D method=NAME out=RUN",
        "tldist.align.recipe:AlignRecipe",
        "tldist.align.run:run",
        "train",
        distributed=True,
    ),
    "export": Stage(
        "turn a bundle into an ONNX package, gated by parity",
        "BUNDLE profile=NAME|FILE.yaml out=PACKAGE [output=logits|probabilities|features|both]",
        "tldist.export.recipe:ExportRecipe",
        "tldist.export.run:run",
        "train",
    ),
    "parity": Stage(
        "compare a package with its bundle, or with the samples stored in it (no torch)",
        "BUNDLE PACKAGE [data=D] | PACKAGE",
        "tldist.export.recipe:ParityRecipe",
        "tldist.export.parity_run:run",
    ),
    "bench": Stage(
        "time a package against PyTorch on this machine",
        "PACKAGE [bundle=B] [batches=1,8,32] [threads=1] [out=RUN]",
        "tldist.bench.recipe:BenchRecipe",
        "tldist.bench.run:run",
    ),
    "embed": Stage(
        "turn a domain of any size into shards of vectors",
        "MODEL data=D out=DIR | out=DIR verify=true",
        "tldist.embed.recipe:EmbedRecipe",
        "tldist.embed.run:run",
        "embed",
        distributed=True,
    ),
    "serve": Stage(
        "answer HTTP requests with a package (no torch)",
        "PACKAGE [host=127.0.0.1] [port=8000]",
        "tldist.serve.recipe:ServeRecipe",
        "tldist.serve.run:run",
        "serve",
    ),
    "report": Stage(
        "one self-contained HTML page from runs and packages",
        "RUN ... out=report.html",
        "tldist.report.recipe:ReportRecipe",
        "tldist.report.run:run",
        "report",
    ),
    "demo": Stage(
        "the story of transfer learning on real digits, offline, in minutes",
        "[out=RUN]",
        "tldist.demo.recipe:DemoRecipe",
        "tldist.demo.run:run",
        "demo",
    ),
    "doctor": Stage(
        "what is wrong with this machine or this job, and what to do",
        "",
        "tldist.doctor.recipe:DoctorRecipe",
        "tldist.doctor.run:run",
        distributed=True,
    ),
    "models": Stage(
        "list the architectures",
        "[PATTERN]",
        "tldist.models.recipe:ModelsRecipe",
        "tldist.models.listing:list_models",
        "train",
    ),
    "layers": Stage(
        "list a model's blocks and layers",
        "M",
        "tldist.models.recipe:LayersRecipe",
        "tldist.models.listing:list_layers",
        "train",
    ),
}


def find_stage(name: str) -> Stage:
    """The stage of a name; an unknown one raises `RecipeError` with the close ones."""
    if name not in STAGES:
        raise RecipeError(f"unknown command '{name}'. {close_matches(name, STAGES)}")
    return STAGES[name]


def _load(reference: str) -> object:
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_recipe_class(stage: Stage) -> type[Recipe]:
    """Import the stage's recipe class (no torch)."""
    return cast("type[Recipe]", _load(stage.recipe))


def load_work(stage: Stage) -> Callable[[Recipe], Outcome]:
    """Import the stage's work (torch, where it needs it)."""
    return cast("Callable[[Recipe], Outcome]", _load(stage.work))


def run_stage(name: str, **settings: object) -> Outcome:
    """Run a stage with settings as keywords (nested ones as mappings or dotted through ``**``)."""
    stage = find_stage(name)
    return load_work(stage)(load_recipe_class(stage).make(**settings))
