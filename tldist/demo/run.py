"""The demo: make domains, train a base, specialise, fuse, adapt, export, check, embed, report."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from tldist import api
from tldist.demo.commands import command, heading, into_log, launched
from tldist.demo.domains import STYLES, write_pool, write_source, write_target
from tldist.demo.recipe import DemoRecipe
from tldist.demo.story import UNADAPTED, Story
from tldist.demo.table import best_row, make_table, show_table
from tldist.errors import MachineError
from tldist.files import read_json, write_json
from tldist.progress import say
from tldist.runs import Outcome, RunFolder, open_run, recorded

TABLE = "table.json"
DRAWS_LOG = "draws.log"


def run(recipe: DemoRecipe) -> Outcome:
    """Tell the story; the same call goes on where it stopped.

    Raises:
        TldistError: a step failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise MachineError("the demo starts its own processes where it needs them: run it as `tldist demo`.")
    story, begin = Story(recipe), time.perf_counter()
    folder = open_run("demo", recipe.out, recipe, {})
    if folder.finished:
        say(f"{folder.path} is finished already.")
        return _outcome(story, folder)
    with recorded(folder, enabled=True):
        _make_domains(story)
        _train_base(story)
        _specialise_and_fuse(story)
        _adapt_first_draw(story)
        rows = _measure_all_draws(story, folder)
        winner = _ship_winner(story, rows)
        _report(story)
        return _finish(story, folder, rows, winner, time.perf_counter() - begin)


def _make_domains(story: Story) -> None:
    """Three source domains, their union, and one target domain for each draw of labels."""
    recipe = story.recipe
    heading("The domains: printed digits in three styles (sources), real handwritten digits (target)")
    sources = [write_source(story.domain(name), name, recipe.printed, recipe.seed) for name in STYLES]
    write_pool(story.domain("pool"), sources)
    targets = [write_target(story.target(draw), draw, recipe.labelled) for draw in range(recipe.draws)]
    for source in sources:
        say(f"{source}: {recipe.printed * 10:,} printed digits")
    train = recipe.labelled * 10
    say(f"{targets[0]}: {train} labelled handwritten digits, the rest to test on ({recipe.draws} draws)")


def _train_base(story: Story) -> None:
    heading("A base model on all sources together, on two processes")
    launched("finetune", **story.base())


def _specialise_and_fuse(story: Story) -> None:
    heading("A specialist for each source: the base, fine-tuned there")
    for name in story.sources:
        command("finetune", **story.source(name))
    heading("The specialists fused into one model: the average of their weights")
    command("fuse", *(story.bundle(f"source-{name}") for name in story.sources), **story.fusion())


def _adapt_first_draw(story: Story) -> None:
    """The first draw of labels, step by step."""
    heading("The target: features aligned without its labels, then five ways to use its few labels")
    command("align", story.bundle("base"), **story.alignment(0))
    for settings in story.trainings(0).values():
        command("finetune", **settings)


def _measure_all_draws(story: Story, folder: RunFolder) -> list[dict[str, Any]]:
    """The other draws through the Python API, and the accuracy of every model on its draw's test images."""
    draws = story.recipe.draws
    heading(f"The same with {draws} draws of the labels (Python API; its output: {folder.path / DRAWS_LOG})")
    accuracies: dict[str, list[float]] = {}
    for draw in range(draws):
        models = {UNADAPTED: story.bundle("base")}
        with into_log(folder.path / DRAWS_LOG):
            api.align(bundle=story.bundle("base"), **story.alignment(draw))
            for method, settings in story.trainings(draw).items():
                api.finetune(**settings)
                models[method] = settings["out"] / "bundle"
            for method, model in models.items():
                found = api.evaluate(model=model, data=story.target(draw), batch_size=256, workers=0)
                accuracies.setdefault(method, []).append(found.values["accuracy"])
        say(
            f"draw {draw}: "
            + ", ".join(f"{method} {values[-1]:.3f}" for method, values in accuracies.items())
        )
    rows = make_table(accuracies)
    write_json(folder.path / TABLE, rows)
    return rows


def _ship_winner(story: Story, rows: list[dict[str, Any]]) -> Path:
    """Export the best model, prove that the package does the same, turn the target into vectors."""
    trainings = story.trainings(0)
    best = best_row(rows, list(trainings))
    bundle, package = Path(trainings[best["method"]]["out"]) / "bundle", story.run("package")
    target = story.target(0)
    heading(f"The winner ({best['method']}) as an ONNX package that is proved to do the same")
    command("export", bundle, profile="cpu-fp32", out=package, output="both", data=target)
    command("parity", bundle, package, data=target)
    heading("The same check as on a serving machine: no torch, only the samples in the package")
    command("parity", package)
    heading("The target domain as vectors, computed by the package")
    command("embed", package, data=target, out=story.run("vectors"))
    return bundle


def _report(story: Story) -> None:
    heading("One report")
    first = [settings["out"] for settings in story.trainings(0).values()]
    runs = [story.recipe.out, story.run("base"), story.run("fused"), story.run("draw-0/aligned"), *first]
    page = story.run("report.html")
    command("report", *runs, story.run("package"), story.run("vectors"), out=page, title="tldist demo")


def _finish(
    story: Story, folder: RunFolder, rows: list[dict[str, Any]], winner: Path, seconds: float
) -> Outcome:
    certificate = read_json(story.run("package") / "parity.json", MachineError, "parity report")
    folder.write_summary(
        "done", table=rows, winner=str(winner), parity=certificate["parity"], seconds=round(seconds, 1)
    )
    return _outcome(story, folder)


def _outcome(story: Story, folder: RunFolder) -> Outcome:
    """The last words: table, report, parity."""
    summary = folder.summary
    rows, few = summary["table"], story.recipe.labelled * 10
    labels = {row["method"]: 0 if row["method"] == UNADAPTED else few for row in rows}
    values = {name: summary[name] for name in ("table", "winner", "parity", "seconds")}
    text = f"\n{show_table(rows, labels)}\n\nreport: {story.run('report.html')}\nparity: {summary['parity']}"
    return Outcome("demo", folder.path, values, text, passed=summary["parity"] == "PASS")
