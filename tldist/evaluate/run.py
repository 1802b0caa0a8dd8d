"""Evaluate: open the model and the domain, measure, say it."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from tldist import distributed
from tldist.data.loader import num_workers
from tldist.distributed import Team
from tldist.domain import Domain, open_domain
from tldist.errors import DomainError
from tldist.evaluate.models import Classifier, open_classifier
from tldist.evaluate.recipe import EvaluateRecipe
from tldist.progress import show_plan
from tldist.runs import Outcome, RunFolder, open_run, recorded
from tldist.training.ledger import LEDGER
from tldist.training.measure import (
    Measurement,
    MultilabelMeasurement,
    OneClassMeasurement,
    measure,
    why_not_measurable,
)

_MOST_ROWS = 40
"""Classes listed one by one; of more, the worst."""


def run(recipe: EvaluateRecipe) -> Outcome:
    """Measure a bundle or a package.

    Raises:
        TldistError: see `tldist.errors`.
    """
    team = distributed.start()
    classifier = open_classifier(recipe.model, team, trust_code=recipe.trust_code)
    domain = open_domain(recipe.data).evaluation_split()
    if not domain.has_labels:
        raise DomainError(
            f"{domain.name}: has no labels to measure against. Expected one folder of images a class, or a "
            f"label column."
        )
    if domain.is_multilabel != (classifier.task == "multilabel"):
        reason = why_not_measurable(domain, classifier.classes, classifier.task)
        raise DomainError(f"{domain.name} cannot measure this model: {reason}.")
    inputs = {"model": classifier.identity, "data": domain.fingerprint}
    team.agree(recipe, inputs)
    folder = _open_folder(recipe, team, inputs)
    with recorded(folder, team.is_main) if folder else nullcontext():
        _show(recipe, team, classifier, domain)
        found = measure(
            classifier.predict,
            domain,
            classifier.classes,
            classifier.preprocessing,
            team,
            batch_size=recipe.batch_size,
            workers=num_workers(recipe.workers, team.local_size),
            ledger_file=folder.path / LEDGER if folder else None,
        )
        if folder and team.is_main:
            folder.write_summary("done", **inputs, measurement=found.to_dict(), processes=team.size)
    return Outcome("evaluate", recipe.out, found.to_dict(), _words(found), "")


def _open_folder(recipe: EvaluateRecipe, team: Team, inputs: dict[str, str]) -> RunFolder | None:
    out = recipe.out
    return None if out is None else team.on_main(lambda: open_run("evaluate", out, recipe, inputs))


def _show(recipe: EvaluateRecipe, team: Team, classifier: Classifier, domain: Domain) -> None:
    how = classifier.preprocessing
    rows: dict[str, Any] = {
        "model": f"{recipe.model}: {classifier.kind}, input {how.height}x{how.width}",
        "data": f"{domain.name}: {len(domain):,} images of {len(domain.used_classes)} classes",
        "processes": team.size,
    }
    show_plan("evaluate", rows)


def _words(found: Measurement) -> str:
    """Accuracy, loss and a line a class."""
    if isinstance(found, MultilabelMeasurement):
        return _words_of_several(found)
    assert isinstance(found, OneClassMeasurement)
    totals, right = found.confusion.sum(1), found.confusion.diagonal()
    present = [row for row in range(len(found.classes)) if totals[row]]
    shown = present
    if len(present) > _MOST_ROWS:
        shown = sorted(present, key=lambda row: right[row] / totals[row])[:_MOST_ROWS]
    width = max(len("class"), *(len(found.classes[row]) for row in shown))
    lines = [f"accuracy {found.accuracy:.4f}, loss {found.loss:.4f} on {found.count:,} images"]
    if found.broken:
        lines.append(f"{found.broken:,} broken images were left out")
    lines.append(f"{'class'.ljust(width)}  images  accuracy  most taken for")
    lines += [f"{_class_row(found, row, width)}" for row in shown]
    if len(shown) < len(present):
        lines.append(f"(the {_MOST_ROWS} worst of {len(present):,} classes)")
    return "\n".join(lines)


def _words_of_several(found: MultilabelMeasurement) -> str:
    """Mean average precision and that of each class, the worst first."""
    worst = sorted(found.average_precision.items(), key=lambda item: item[1])[:_MOST_ROWS]
    width = max([len("class"), *(len(name) for name, _ in worst)])
    return "\n".join(
        [
            f"mean average precision {found.score:.4f}, F1 {found.f1:.4f}, right decisions "
            f"{found.accuracy:.4f}, loss {found.loss:.4f} on {found.count:,} images",
            f"{'class'.ljust(width)}  average precision",
            *(f"{name.ljust(width)}  {value:17.4f}" for name, value in worst),
        ]
    )


def _class_row(found: OneClassMeasurement, row: int, width: int) -> str:
    counts = found.confusion[row]
    total, right = int(counts.sum()), int(counts[row])
    others = counts.copy()
    others[row] = 0
    worst = int(others.argmax())
    taken = f"{found.classes[worst]} ({int(others[worst])})" if others[worst] else ""
    return f"{found.classes[row].ljust(width)}  {total:6d}  {right / total:8.4f}  {taken}".rstrip()
