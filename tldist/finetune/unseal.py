"""The last measurement of an adaptation: labels are opened once all is settled, and that is noted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tldist.domain import open_domain
from tldist.errors import RecipeError
from tldist.files import read_json, write_json
from tldist.finetune.choose import Bench, Trial
from tldist.progress import warn
from tldist.training.measure import Measurement, measure, predictor, why_not_measurable

UNSEALED = "unsealed.json"


def unseal(bench: Bench, trials: Sequence[Trial], choice: dict[str, Any]) -> dict[str, Any]:
    """Measure all trials on the target's test images; called by all processes together.

    Only after the choice is on disk: what is found here changes nothing. Where a run is stopped in between
    and goes on, the labels are opened again, and the record says how often.

    Args:
        bench: of the choice.
        trials: as they were judged.
        choice: of `tldist.finetune.choose.settle`.

    Returns:
        For the summary: ``adaptation`` and ``target_test`` (None where it could not be measured).
    """
    assert bench.recipe.adapt.target is not None
    opened = open_domain(bench.recipe.adapt.target).evaluation_split()
    reason = why_not_measurable(opened, bench.classes, "multiclass")
    if reason:
        warn(f"the accuracy on {opened.name} is not measured: {reason}")
        return {"adaptation": {**choice, "unsealed": None, "not_measured": reason}, "target_test": None}
    record = bench.team.on_main(lambda: _note(bench, opened.name, len(opened)))
    found: dict[str, Measurement] = {}
    for trial in trials:
        model = trial.load()
        bench.team.same_buffers(model)
        found[trial.name] = measure(
            predictor(model, bench.how), opened, bench.classes, bench.how, bench.team,
            workers=bench.workers, label=f"{trial.name}: target test", stop=bench.stop,
        )  # fmt: skip
    rows = [{**row, "test": found[row["name"]].accuracy} for row in choice["candidates"]]
    best = max(measured.accuracy for measured in found.values())
    reached = found[choice["chosen"]]
    adaptation = {
        **choice,
        "candidates": rows,
        "regret": best - reached.accuracy,
        "unsealed": record,
    }
    return {"adaptation": adaptation, "target_test": reached.to_dict()}


def _note(bench: Bench, name: str, images: int) -> dict[str, Any]:
    """Write down that labels are opened, before they are."""
    file = bench.folder.path / UNSEALED
    before = read_json(file, RecipeError, "record of opened labels")["times"] if file.is_file() else 0
    record = {
        "domain": name,
        "images": images,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "times": before + 1,
        "why": "the last measurement, after the choice",
    }
    write_json(file, record)
    return record
