"""Run a graph on the reference samples at several batch sizes, and compare every output. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from tldist.bundle import Task
from tldist.export.agreement import Agreement
from tldist.export.compare import Meaning, compare
from tldist.export.decisions import Answers
from tldist.export.profile import Tolerances
from tldist.runtime.package import FEATURES, LOGITS, PROBABILITIES
from tldist.runtime.reference import EXTREMES, Reference, Samples
from tldist.runtime.session import Session

SMALL = (1, 2, 7)
"""Batch sizes at which samples are run: alone, even, and odd with an incomplete last batch."""
LARGE = 32
"""The batch size at which all samples are run, again from the first one until the last batch is full."""
BATCHES = (*SMALL, LARGE)
FEW = 24
"""Samples that are run at the small batch sizes too, extremes first; all would take three times as long."""


@dataclass
class _Run:
    """What a graph answered: rows of samples, in pieces; and the batch sizes at which it failed."""

    samples: list[np.ndarray] = field(default_factory=list)
    found: list[dict[str, np.ndarray]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def judge(
    session: Session,
    reference: Reference,
    tolerances: Tolerances,
    *,
    task: Task = "multiclass",
    temperature: float = 1.0,
) -> tuple[Agreement, ...]:
    """Run a graph on the reference samples at every batch size, and compare each output.

    Args:
        session: the graph, where it will serve.
        reference: samples, PyTorch's answers, and perhaps what the package answered before.
        tolerances: of the profile.
        task: how logits decide.
        temperature: of the probabilities.
    """
    run = _run_all(session, reference.samples)
    return tuple(
        _agreement(name, run, reference, tolerances, _meaning(name, reference, tolerances, task, temperature))
        for name in session.outputs
    )


def answers_alone(session: Session, samples: Samples) -> dict[str, np.ndarray]:
    """float32 (N, D) of each output, each image run alone: what a package records of itself."""

    def one_by_one(images: np.ndarray) -> dict[str, np.ndarray]:
        parts = [session.run(image[None]) for image in images]
        return {name: np.concatenate([part[name] for part in parts]) for name in session.outputs}

    return samples.collect(one_by_one)


def departing_images(session: Session, reference: Reference) -> np.ndarray:
    """The image (1, H, W, 3) whose answers are farthest from PyTorch's; where it agrees alone, and only
    batches go wrong, the batch of two that starts with it."""
    worst, image = -1.0, reference.samples.images[:1]
    for rows, images in reference.samples.by_size():
        for row, one in zip(rows, images):
            error = _distance(session, one[None], reference, row)
            if error > worst:
                worst, image = error, one[None]
    return image if worst > 1e-6 else np.repeat(image, 2, axis=0)


def _distance(session: Session, image: np.ndarray, reference: Reference, row: int) -> float:
    """The largest error of an image's answers, relative to the magnitude of each output; infinite for NaN."""
    try:
        found = session.run(image)
    except Exception:  # ONNX Runtime's own classes have no common base; what fails is farthest
        return np.inf
    errors = [
        np.abs(found[name][0] - values[row]).max() / max(np.abs(values).max(), 1e-30)
        for name, values in reference.expected.items()
    ]
    return float(np.nan_to_num(max(errors), nan=np.inf, posinf=np.inf))


def _run_all(session: Session, samples: Samples) -> _Run:
    run = _Run()
    for rows, images in samples.by_size():
        extreme = np.isin(samples.group_of[rows], EXTREMES)
        for size, chosen in _plan(extreme):
            _run_in_batches(session, rows, images, size, chosen, run)
    return run


def _plan(extreme: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Batch sizes, and the positions of the images to run at each; ``extreme``: bool (n,)."""
    count = len(extreme)
    if count < max(SMALL):  # images of a size of their own: alone, and all in one batch
        yield 1, np.arange(count)
        yield max(count, 2), np.resize(np.arange(count), max(count, 2))
        return
    pictures = np.flatnonzero(~extreme)
    most = max(1, FEW - int(extreme.sum()))
    spread = pictures[np.linspace(0, len(pictures) - 1, min(most, len(pictures))).round().astype(int)]
    few = np.sort(np.concatenate([spread, np.flatnonzero(extreme)]))
    for size in SMALL:
        yield size, few
    yield LARGE, np.resize(np.arange(count), -(-count // LARGE) * LARGE)


def _run_in_batches(
    session: Session, rows: np.ndarray, images: np.ndarray, size: int, chosen: np.ndarray, run: _Run
) -> None:
    for start in range(0, len(chosen), size):
        places = chosen[start : start + size]
        try:
            found = session.run(images[places])
        except Exception as error:  # ONNX Runtime's own classes have no common base
            reason = " ".join(str(error).split())[:200]
            run.failures.append(f"it fails at batch size {len(places)}: {reason}")
            return
        lengths = {name: len(values) for name, values in found.items() if len(values) != len(places)}
        if lengths:
            run.failures.append(f"for a batch of {len(places)} it gives {lengths} rows")
            return
        run.samples.append(rows[places])
        run.found.append(found)


def _agreement(
    name: str, run: _Run, reference: Reference, tolerances: Tolerances, meaning: Meaning
) -> Agreement:
    if not run.found:
        return Agreement(name, 0, faults=tuple(run.failures))
    samples = np.concatenate(run.samples)
    more = {"referee": reference.referee, "exported": reference.exported, "fitted": reference.fitted}
    answers = Answers(
        expected=reference.expected[name][samples],
        found=np.concatenate([found[name] for found in run.found]),
        groups=reference.samples.group_of[samples],
        samples=samples,
        **{who: part[name][samples] for who, part in more.items() if name in part},
    )
    agreement = compare(name, answers, tolerances, meaning)
    return replace(agreement, faults=(*run.failures, *agreement.faults))


def _meaning(
    name: str, reference: Reference, tolerances: Tolerances, task: Task, temperature: float
) -> Meaning:
    probable = _probable(reference, tolerances, task, temperature) if name == PROBABILITIES else None
    embeds = name == FEATURES or name.startswith(f"{FEATURES}.")
    return Meaning(decides=name == LOGITS, embeds=embeds, probable=probable, task=task)


def _probable(
    reference: Reference, tolerances: Tolerances, task: Task, temperature: float
) -> dict[str, float]:
    """What the tolerance of the logits lets the probabilities of each group be off by.

    The largest change of a softmax is at most half the largest change of its logits (the rows of its Jacobian
    are p_i (delta_ij - p_j), whose absolute sum is 2 p_i (1 - p_i)); that of a sigmoid a quarter.
    """
    logits = reference.expected.get(LOGITS)
    if logits is None:
        return {}
    share = (0.25 if task == "multilabel" else 0.5) * tolerances.max_relative / temperature
    groups = reference.samples.group_of
    return {
        name: min(1.0, share * float(np.abs(logits[groups == name]).max()))
        for name, _ in reference.samples.groups
    }
