"""Try methods and coefficients on validation, rank them, keep the best; never less than the best parent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tldist.errors import RecipeError
from tldist.files import write_text
from tldist.fuse.in_weights import Merge, build, fuse_in_weights, keep_parent
from tldist.fuse.job import Fused, Job
from tldist.fuse.labels import short_names
from tldist.fuse.selection import choose_soup, soup_of
from tldist.fuse.settings import default_settings
from tldist.fuse.trials import Score, Trials
from tldist.fuse.weights.method import Method
from tldist.fuse.weights.methods import METHODS
from tldist.progress import say, warn

_FEW_BATCHES = 4
"""That fit the statistics of what is only compared."""
_GRIDS = {"alpha": (0.0, 1.0), "scale": (0.1, 1.0), "density": (0.1, 0.9)}
"""Ends between which each coefficient is tried."""
SEARCHED = [name for name, method in METHODS.items() if method.aid is None]
"""Methods that are tried: those that need neither statistics nor training."""


@dataclass(frozen=True)
class Candidate:
    """One merge to try.

    Attributes:
        method: its name.
        detail: the coefficients that differ from the method's own, as text.
        merge: what is merged.
    """

    method: str
    detail: str
    merge: Merge

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} {self.detail}".strip()

    def describe(self) -> dict[str, Any]:
        """How to make it again, as plain data: the method and every setting that it takes note of."""
        settings, uses = self.merge.settings, self.merge.method.uses
        used = [name for name in ("alpha", "scale", "density", "gamma", "seed") if name in uses]
        return {
            "method": self.method,
            "members": list(self.merge.members),
            "weights": list(settings.weights),
            **{name: getattr(settings, name) for name in used},
        }


def candidates(job: Job) -> list[Candidate]:
    """All merges to try: each method with its own coefficients, and with each of them varied alone.

    Raises:
        RecipeError: a method that the search does not know, or none is left.
    """
    asked = job.recipe.search.methods
    for name in asked or ():
        if name not in SEARCHED:
            raise RecipeError(f"search.methods={name}: unknown here (known: {', '.join(SEARCHED)}).")
    found = [
        candidate
        for name in SEARCHED
        if (asked is None or name in asked) and _allowed(job, METHODS[name])
        for candidate in _variants(job, name, METHODS[name])
    ]
    if not found:
        raise RecipeError("search.methods: none of them fits these bundles (is base= missing?).")
    return found


def _allowed(job: Job, method: Method) -> bool:
    least, most = method.models
    count = len(job.parents)
    return (job.base is not None or not method.needs_base) and least <= count <= (most or count)


def _variants(job: Job, name: str, method: Method) -> Iterator[Candidate]:
    everyone = tuple(range(len(job.parents)))
    own = default_settings(method, job.settings.weights, job.recipe.seed)
    if "alpha" not in method.uses:
        yield Candidate(name, "", Merge(method, own, everyone))
    for key in ("alpha", "scale", "density"):
        if key not in method.uses:
            continue
        low, high = _GRIDS[key]
        points = job.recipe.search.points
        grid = np.linspace(low, high, points + 2)[1:-1] if key == "alpha" else np.linspace(low, high, points)
        for value in grid.round(4).tolist():
            if value != method.defaults.get(key):
                merge = Merge(method, replace(own, **{key: value}), everyone)
                yield Candidate(name, f"{key}={value:g}", merge)


def search(job: Job) -> Fused:
    """Measure all candidates with statistics from a few batches, the best of them with all; keep the winner.

    Raises:
        RecipeError: no labelled data to choose on.
    """
    trials = Trials(job)
    parents = trials.parents()
    tried = candidates(job)
    say(f"search: {len(tried)} merges on {trials.validation.name} ({len(trials.validation):,} images)")
    quick = {c.name: trials.score(f"quick {c.name}", c.merge, most_batches=_FEW_BATCHES) for c in tried}
    soup, _ = choose_soup(job, trials)
    if len(soup) > 1:
        tried.append(Candidate("greedy_soup", " + ".join(str(n + 1) for n in soup), soup_of(job, soup)))
        quick[tried[-1].name] = trials.score(f"quick {tried[-1].name}", tried[-1].merge)
    ranked = sorted(tried, key=lambda candidate: quick[candidate.name].key, reverse=True)
    finalists = ranked[: job.recipe.search.keep]
    final = {c.name: trials.score(f"whole {c.name}", c.merge) for c in finalists}
    winner = max(finalists, key=lambda candidate: final[candidate.name].key)
    table = _table(job, trials, parents, ranked, quick, final)
    _show(job, table)
    best = max(parents, key=lambda label: parents[label].key, default=None)
    if best is not None and parents[best].score > final[winner.name].score:
        warn(
            f"no merge is better on {trials.validation.name} than {best} (accuracy "
            f"{parents[best].accuracy:.4f}, the best merge {final[winner.name].accuracy:.4f}): it is kept"
        )
        kept = next(n for n, parent in enumerate(job.parents) if parent.label == best)
        fused, found = keep_parent(job, kept), {"kept": best}
    else:
        fused = fuse_in_weights(job, winner.merge)
        found = {"kept": winner.name, **winner.describe()}
    return replace(fused, notes={**fused.notes, "search": {**found, "table": table}})


def _table(
    job: Job,
    trials: Trials,
    parents: dict[str, Score],
    ranked: list[Candidate],
    quick: dict[str, Score],
    final: dict[str, Score],
) -> list[dict[str, Any]]:
    """One row a model, best first: what was measured where."""
    rows: list[dict[str, Any]] = [
        {"name": label, "kind": "parent", **vars(score), **_on_sources(job, trials, label, None)}
        for label, score in parents.items()
    ]
    for candidate in ranked:
        whole = final.get(candidate.name)
        more = _on_sources(job, trials, candidate.name, candidate.merge) if whole else {"sources": {}}
        kind = "merge" if whole else "merge, few batches"
        rows.append({"name": candidate.name, "kind": kind, **vars(whole or quick[candidate.name]), **more})
    return sorted(rows, key=lambda row: (-row["score"], row["loss"]))


def _on_sources(job: Job, trials: Trials, name: str, merge: Merge | None) -> dict[str, Any]:
    """Accuracy on each source domain that has labels."""

    def measured() -> dict[str, Any]:
        if merge is None:
            parent = next(parent for parent in job.parents if parent.label == name)
            model, config = job.load(parent)
        else:
            built = build(job, merge)
            model, config = built.model, built.config
        found = {}
        for label, source in zip(short_names([source.name for source in job.sources]), job.sources):
            score = job.measure(model, config, source.evaluation_split(), f"{name} on {label}")
            if score is not None:
                found[label] = score.accuracy
        return {"sources": found}

    return trials.once(f"sources {name}", measured) if job.sources else {"sources": {}}


def _show(job: Job, table: list[dict[str, Any]]) -> None:
    """Print the ranked table, and draw it where there is something to draw with."""
    sources = list(dict.fromkeys(name for row in table for name in row["sources"]))
    width = max(len(row["name"]) for row in table)
    say(f"{'model'.ljust(width)}  accuracy  loss    " + "  ".join(sources))
    for row in table:
        others = "  ".join(
            f"{row['sources'][name]:.4f}".rjust(len(name)) if name in row["sources"] else " " * len(name)
            for name in sources
        )
        few = "  (few batches)" if row["kind"].endswith("few batches") else ""
        say(f"{row['name'].ljust(width)}  {row['accuracy']:8.4f}  {row['loss']:.4f}  {others}{few}".rstrip())
    if job.team.is_main:
        _draw(job, table, sources)


def _draw(job: Job, table: list[dict[str, Any]], sources: list[str]) -> None:
    try:
        from tldist import pictures
    except ImportError:
        warn("no picture of the search: pip install 'tldist[report]'")
        return
    target = job.validation.name if job.validation else "target"
    series = {target: [row["accuracy"] for row in table]}
    series |= {name: [row["sources"].get(name) for row in table] for name in sources}
    parents = [row["name"] for row in table if row["kind"] == "parent"]
    short = dict(zip(parents, short_names(parents)))
    svg = pictures.ranking([short.get(row["name"], row["name"]) for row in table], series, "accuracy")
    write_text(job.folder.path / "search.svg", pictures.as_file(svg))
