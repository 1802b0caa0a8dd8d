"""The demo: make domains, train a base, specialise, fuse, adapt, export, check, embed, report."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from tldist import api
from tldist.demo.commands import command, heading, into_log, launched
from tldist.demo.domains import STYLES, write_pool, write_source, write_target
from tldist.demo.recipe import DemoRecipe
from tldist.demo.story import ALIGNED, FUSED_ONLY, UNADAPTED, WITHOUT_LABELS, Story
from tldist.demo.table import best_row, make_table, show_table
from tldist.errors import MachineError
from tldist.files import read_json, write_json
from tldist.progress import say
from tldist.runs import CHECKPOINTS, Outcome, RunFolder, open_run, recorded

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
        _train_specialists(story)
        _adapt_first_draw(story)
        rows = _measure_all_draws(story, folder)
        winner = _ship_winner(story, rows)
        _report(story)
        _tidy(story)
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


def _train_specialists(story: Story) -> None:
    heading("A specialist for each source: the base, fine-tuned there")
    for name in story.sources:
        command("finetune", **story.source(name))


def _adapt_first_draw(story: Story) -> None:
    """The first draw of labels, step by step."""
    heading("The target without its labels: the specialists fused, and the base's features aligned")
    command("fuse", *_specialists(story), **story.fusion(0))
    command("align", story.bundle("base"), **story.alignment(0))
    heading(f"Four ways to use {story.recipe.labelled * 10} labels of the target")
    for settings in story.trainings(0).values():
        command("finetune", **settings)


def _measure_all_draws(story: Story, folder: RunFolder) -> list[dict[str, Any]]:
    """The other draws through the Python API, and the accuracy of every model on its draw's test images."""
    draws, log = story.recipe.draws, folder.path / DRAWS_LOG
    heading(f"The same with {draws} draws of the labels, through the Python API (its output: {log})")
    accuracies: dict[str, list[float]] = {}
    for draw in range(draws):
        with into_log(log):
            found = _one_draw(story, draw)
        for method, accuracy in found.items():
            accuracies.setdefault(method, []).append(accuracy)
        say(f"draw {draw}: " + ", ".join(f"{method} {accuracy:.3f}" for method, accuracy in found.items()))
    rows = make_table(accuracies)
    write_json(folder.path / TABLE, rows)
    return rows


def _one_draw(story: Story, draw: int) -> dict[str, float]:
    """Accuracy of each method on the test images; what is finished already is only measured."""
    models = {UNADAPTED: story.bundle("base")}
    models[FUSED_ONLY] = _bundle(api.fuse(bundles=_specialists(story), **story.fusion(draw)))
    models[ALIGNED] = _bundle(api.align(bundle=story.bundle("base"), **story.alignment(draw)))
    for method, settings in story.trainings(draw).items():
        models[method] = _bundle(api.finetune(**settings))
    target = story.target(draw)
    measured = {
        method: api.evaluate(model=model, data=target, batch_size=256, workers=0)
        for method, model in models.items()
    }
    return {method: float(outcome.values["accuracy"]) for method, outcome in measured.items()}


def _bundle(outcome: Outcome) -> Path:
    return Path(outcome.values["bundle"])


def _specialists(story: Story) -> list[Path]:
    return [story.bundle(f"source-{name}") for name in story.sources]


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
    without = [story.run("draw-0/fused"), story.run("draw-0/aligned")]
    first = [settings["out"] for settings in story.trainings(0).values()]
    runs = [story.recipe.out, story.run("base"), *without, *first]
    page = story.run("report.html")
    command("report", *runs, story.run("package"), story.run("vectors"), out=page, title="tldist demo")


def _tidy(story: Story) -> None:
    """Finished runs need their checkpoints only to be trained longer, which the demo never does."""
    checkpoints = [folder for folder in story.recipe.out.rglob(CHECKPOINTS) if folder.is_dir()]
    size = sum(file.stat().st_size for folder in checkpoints for file in folder.rglob("*") if file.is_file())
    for folder in checkpoints:
        shutil.rmtree(folder)
    say(f"the checkpoints of the finished runs were removed ({size / 1e9:.1f} GB)")


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
    labels = {row["method"]: 0 if row["method"] in WITHOUT_LABELS else few for row in rows}
    values = {name: summary[name] for name in ("table", "winner", "parity", "seconds")}
    text = f"\n{show_table(rows, labels)}\n\nreport: {story.run('report.html')}\nparity: {summary['parity']}"
    return Outcome("demo", folder.path, values, text, passed=summary["parity"] == "PASS")
