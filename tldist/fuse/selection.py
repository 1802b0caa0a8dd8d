"""Fusions that choose by measuring on validation: greedy soup, and the best alpha of a curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tldist.errors import RecipeError
from tldist.fuse.in_weights import Merge, fuse_in_weights, keep_parent, whole_merge
from tldist.fuse.job import Fused, Job
from tldist.fuse.trials import Score, Trials
from tldist.fuse.weights.methods import METHODS
from tldist.progress import say


def soup_of(job: Job, members: Sequence[int]) -> Merge:
    """The uniform average of some of the parents."""
    weights = tuple(job.settings.weights[number] for number in members)
    settings = replace(job.settings, weights=weights if sum(weights) else (1.0,) * len(members))
    return Merge(METHODS["average"], settings, tuple(members))


def greedy_soup(job: Job) -> Fused:
    """Greedy soup, arXiv:2203.05482, recipe 1: from the best model on, each next one is averaged in where
    that does not lower the score on validation.

    Raises:
        RecipeError: no labelled data, or no model can be measured on it.
    """
    members, rows = choose_soup(job, Trials(job))
    say("greedy soup of " + ", ".join(job.parents[number].label for number in members))
    if len(members) == 1:
        fused = keep_parent(job, members[0])
    else:
        fused = fuse_in_weights(job, soup_of(job, members))
    return replace(fused, notes={**fused.notes, "soup": rows})


def choose_soup(job: Job, trials: Trials) -> tuple[list[int], list[dict[str, object]]]:
    """The members of the greedy soup, in the order in which they came in, and how each was decided."""
    parents = trials.parents()
    scored = [n for n, parent in enumerate(job.parents) if parent.label in parents]
    if not scored:
        raise RecipeError("greedy_soup: no bundle can be measured on data=.")
    order = sorted(scored, key=lambda number: parents[job.parents[number].label].key, reverse=True)
    members, best = [order[0]], parents[job.parents[order[0]].label]
    rows: list[dict[str, object]] = [_row(job, order[0], best, taken=True)]
    for number in order[1:]:
        trial = [*members, number]
        found = trials.score(f"soup of {' + '.join(str(n + 1) for n in trial)}", soup_of(job, trial))
        taken = found.score >= best.score
        rows.append(_row(job, number, found, taken=taken))
        if taken:
            members, best = trial, found
    return members, rows


def _row(job: Job, number: int, found: Score, *, taken: bool) -> dict[str, object]:
    return {
        "model": job.parents[number].label,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "taken": taken,
    }


def best_of_curve(job: Job) -> Fused:
    """Merge with each alpha of ``curve=``, and keep the best on validation (of equals the smallest).

    The curve of WiSE-FT, arXiv:2109.01903, figure 1.
    """
    assert job.recipe.curve is not None
    trials = Trials(job)
    whole = whole_merge(job)
    found: dict[float, Score] = {}

    def with_alpha(alpha: float) -> Merge:
        return replace(whole, settings=replace(whole.settings, alpha=alpha))

    for alpha in sorted(set(job.recipe.curve)):
        found[alpha] = trials.score(f"alpha {alpha:g}", with_alpha(alpha))
        say(f"alpha {alpha:.3f}  accuracy {found[alpha].accuracy:.4f}  loss {found[alpha].loss:.4f}")
    best = max(found, key=lambda alpha: found[alpha].key)
    fused = fuse_in_weights(job, with_alpha(best))
    rows = [{"alpha": a, "accuracy": score.accuracy, "loss": score.loss} for a, score in found.items()]
    return replace(fused, notes={**fused.notes, "alpha": best, "curve": rows})
