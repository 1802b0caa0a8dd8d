"""The section of a run: its summary, curves, measurements, confusion matrix, proof of what was frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tldist import pictures
from tldist.report.adaptation import adaptation_notes, adaptation_tables
from tldist.report.fusion import choice_pictures, choice_tables
from tldist.report.page import Confusion, Picture, Section, Table
from tldist.report.text import facts, is_number, name_of, read_mapping, read_settings, short, show
from tldist.runs import SUMMARY, RunFolder

LARGEST_CONFUSION = 25
"""Classes up to which the whole matrix is shown; of more, the most frequent confusions."""
_KINDS = {"finetune": "fine-tuning", "fuse": "fusion", "align": "alignment", "evaluate": "evaluation"}
_HIDDEN = {
    "stage",
    "status",
    "frozen",
    "bundle",
    "reason",
    "finished_at",
    "tldist",
    "python",
    "host",
    "format",
}
_MADE = ("finished_at", "host", "tldist", "python")

Found = tuple[str, dict[str, Any]]
"""What a measurement is called, and the measurement."""


def read_stage(folder: Path) -> Section:
    """Read a run of any stage that measures or trains.

    Raises:
        RecipeError: its summary is damaged.
    """
    there = (folder / SUMMARY).is_file()
    summary = read_mapping(folder / SUMMARY, "run summary") if there else {}
    stage, status = str(summary.get("stage", "run")), str(summary.get("status", "unfinished"))
    measured = list(find_measurements(summary))
    last = measured[-1][1] if measured else {}
    scalars = [name for name, value in summary.items() if _is_fact(name, value)]
    return Section(
        title=name_of(folder),
        kind=_KINDS.get(stage, stage),
        path=str(folder),
        status=status,
        good={"done": True, "failed": False}.get(status),
        headline=_headline(last),
        facts=facts(summary, [*scalars, *_MADE]),
        notes=list(_notes(summary)),
        pictures=[
            *_curves(RunFolder(folder, stage).read_metrics(), summary.get("selected_step")),
            *choice_pictures(summary),
        ],
        tables=[
            *_measurements(measured),
            *choice_tables(summary),
            *adaptation_tables(summary),
            *_confusion_tables(measured[-1:]),
        ],
        confusions=list(_confusions(measured[-1:])),
        settings=read_settings(folder),
    )


def find_measurements(values: Any, name: str = "") -> Iterator[Found]:
    """All measurements inside a summary, in its order, wherever they are nested."""
    if not isinstance(values, dict):
        return
    if is_number(values.get("accuracy")):
        yield name, values
        return
    for key, value in values.items():
        yield from find_measurements(value, f"{name}: {key}" if name else key.replace("_", " "))


def _is_fact(name: str, value: Any) -> bool:
    return name not in _HIDDEN and isinstance(value, str | int | float)


def _headline(last: dict[str, Any]) -> str:
    """What was reached, by the measurement that counts."""
    if is_number(last.get("mean_average_precision")):
        return f"mean average precision {show(last['mean_average_precision'])}"
    return f"accuracy {show(last['accuracy'])}" if last else ""


def _notes(summary: dict[str, Any]) -> Iterator[str]:
    if summary.get("reason"):
        yield str(summary["reason"])
    yield from adaptation_notes(summary)
    duplicates = summary.get("duplicates")
    if isinstance(duplicates, dict) and duplicates:
        found = ", ".join(f"{show(count)} {name}" for name, count in sorted(duplicates.items()))
        yield f"Images lie in two splits ({found}): what is measured is too good."
    probe, validation = summary.get("linear_probe"), summary.get("validation")
    if isinstance(probe, dict) and isinstance(validation, dict):
        reached, plain = validation.get("accuracy"), probe.get("accuracy")
        if is_number(reached) and is_number(plain) and float(reached) < float(plain):  # type: ignore[arg-type]
            yield f"The result is below a plain linear probe on the same images ({show(plain)})."
    frozen = summary.get("frozen")
    if isinstance(frozen, dict) and frozen.get("tensors"):
        before, after = short(frozen.get("before")), short(frozen.get("after"))
        verdict = f"is the same before and after ({before})" if before == after else "DIFFERS"
        yield f"The SHA-256 of the {show(frozen['tensors'])} frozen tensors {verdict}."
        if before != after:
            yield f"Before: {before}. After: {after}."


def _curves(lines: Sequence[dict[str, Any]], chosen: Any) -> Iterator[Picture]:
    mark = float(chosen) if is_number(chosen) else None

    def series(key: str) -> tuple[list[float], list[float]]:
        kept = [line for line in lines if is_number(line.get(key)) and is_number(line.get("step"))]
        return [float(line["step"]) for line in kept], [float(line[key]) for line in kept]

    def picture(names: dict[str, str], ylabel: str, caption: str) -> Iterator[Picture]:
        found = {name: series(key) for name, key in names.items()}
        found = {name: points for name, points in found.items() if points[0]}
        if found:
            svg = pictures.curves(found, ylabel, mark=mark, mark_label="chosen")
            yield Picture(svg, caption)

    yield from picture({"training": "loss", "validation": "val_loss"}, "loss", "Loss in nats")
    yield from picture({"validation": "val_accuracy"}, "accuracy", "Accuracy on validation")
    yield from picture({"learning rate": "lr"}, "learning rate", "Learning rate")


def _measurements(measured: Sequence[Found]) -> Iterator[Table]:
    if not measured:
        return
    rows = [
        [name, *(show(values.get(key)) for key in ("accuracy", "loss", "count", "broken"))]
        for name, values in measured
    ]
    yield Table("What was measured", ("on", "accuracy", "loss", "images", "broken images"), rows)


def _matrix(values: dict[str, Any]) -> tuple[list[str], list[list[int]]] | None:
    """(classes, counts), where they are there and fit."""
    classes, counts = values.get("classes"), values.get("confusion")
    if not isinstance(classes, list) or not isinstance(counts, list) or len(counts) != len(classes):
        return None
    if not classes or any(not isinstance(row, list) or len(row) != len(classes) for row in counts):
        return None
    return [str(name) for name in classes], counts


def _confusions(measured: Sequence[Found]) -> Iterator[Confusion]:
    for name, values in measured:
        matrix = _matrix(values)
        if matrix and len(matrix[0]) <= LARGEST_CONFUSION:
            yield Confusion(f"Confusion matrix ({name}): rows are true, columns predicted", *matrix)


def _confusion_tables(measured: Sequence[Found]) -> Iterator[Table]:
    """Of a large matrix, the most frequent confusions."""
    for name, values in measured:
        matrix = _matrix(values)
        if not matrix or len(matrix[0]) <= LARGEST_CONFUSION:
            continue
        classes, counts = matrix
        pairs = [
            (count, row, column)
            for row, line in enumerate(counts)
            for column, count in enumerate(line)
            if count and row != column
        ]
        rows = [
            [classes[row], classes[column], show(count), show(sum(counts[row]))]
            for count, row, column in sorted(pairs, key=lambda pair: -pair[0])[:20]
        ]
        caption = f"The most frequent confusions ({name}, {len(classes)} classes)"
        yield Table(caption, ("true class", "taken for", "images", "of"), rows, words=(0, 1))
