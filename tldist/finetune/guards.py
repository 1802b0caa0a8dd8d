"""What makes a measured quality untrue or useless: images in two splits, a result that a probe beats."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tldist.data.duplicates import find_duplicates
from tldist.domain import Domain
from tldist.errors import RecipeError
from tldist.features.cache import default_folder
from tldist.features.extract import extract
from tldist.features.heads import DEFAULT_GRID, fit_logistic
from tldist.files import canonical_json, read_json, sha256_text, write_json
from tldist.finetune.job import Job
from tldist.progress import warn

MOST_IMAGES = 50_000
"""Above so many images, guard.duplicates=auto does not look."""
LEAST_EPOCHS = 4
"""From so many epochs on, guard.probe=auto costs no more than about a tenth of the training."""

DUPLICATES, PROBE = "duplicates.json", "linear_probe.json"


@dataclass(frozen=True)
class Guards:
    """What was found.

    Attributes:
        duplicates: how many images lie in two splits, by pair of splits and kind; None: not looked for.
        probe: accuracy and loss of the plain linear probe; None: not measured.
    """

    duplicates: dict[str, int] | None
    probe: dict[str, float] | None


def look_for_duplicates(job: Job) -> dict[str, int] | None:
    """Images that lie in more than one split; called by all processes together.

    Found once for the same domains: the list is kept in the user's cache folder, and in the run.

    Returns:
        How many, by pair of splits and kind; None where it was not looked for.
    """
    file, inputs = job.folder.path / DUPLICATES, job.inputs
    splits = {"train": inputs.train, "val": inputs.validation, "test": inputs.test}
    there: dict[str, Domain] = {name: domain for name, domain in splits.items() if domain is not None}
    asked = job.recipe.guard.duplicates
    images = sum(map(len, there.values()))
    if asked == "off" or len(there) < 2 or (asked == "auto" and images > MOST_IMAGES):
        return None
    key = sha256_text(canonical_json({name: domain.fingerprint for name, domain in there.items()}))[:32]
    kept = default_folder().parent / "duplicates" / f"{key}.json"
    if not job.team.on_main(kept.is_file):
        found = find_duplicates(there, job.team, max(1, job.workers))
        rows = [{"kind": "exact" if one.exact else "near", **dict([one.first, one.second])} for one in found]
        job.team.on_main(lambda: _write_below(kept, rows))
    pairs = job.team.on_main(lambda: read_json(kept, RecipeError, "list of duplicates"))
    job.team.on_main(lambda: write_json(file, {"pairs": pairs}))
    counts = Counter(f"{'/'.join(name for name in splits if name in pair)} {pair['kind']}" for pair in pairs)
    if counts:
        words = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        warn(f"images lie in two splits ({words}): what is measured is too good. See {file}")
    return dict(counts)


def _write_below(file: Path, value: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, value)


def plain_probe(job: Job) -> dict[str, float] | None:
    """The validation accuracy of a linear probe on the model as it starts; called by all processes together.

    Logistic regression on what the head reads, the best of a few strengths: the least that fine-tuning has to
    reach. Measured once a run, before the first step.
    """
    file, inputs, asked = job.folder.path / PROBE, job.inputs, job.recipe.guard.probe
    if job.team.on_main(file.is_file):
        return job.team.on_main(lambda: read_json(file, RecipeError, "linear probe"))
    pays = (
        job.recipe.train != "head"
        and not inputs.train.is_multilabel
        and inputs.start.config.lineage.get("weights") != "none"
        and job.state.epochs >= LEAST_EPOCHS
    )
    if inputs.train.is_multilabel and asked == "on":
        warn("guard.probe=on: not measured, a linear probe needs one class an image")
        return None
    has_begun = job.state.position.step > 0  # the model has left where it started
    if inputs.validation is None or has_begun or asked == "off" or (asked == "auto" and not pays):
        return None
    seen, unseen = (
        extract(
            job.model, inputs.how, domain, job.team,
            workers=job.workers, classes=inputs.classes, label=f"linear probe: {name}",
        )
        for name, domain in (("train", inputs.train), ("validation", inputs.validation))
    )  # fmt: skip

    def fit() -> dict[str, float]:
        tried = []
        for l2 in DEFAULT_GRID:
            head = fit_logistic(seen.features, seen.labels, len(inputs.classes), l2=l2)
            logits = head.logits(unseen.features)
            loss = float(nn.functional.cross_entropy(logits, unseen.labels))
            tried.append((float((logits.argmax(1) == unseen.labels).double().mean()), -loss, l2))
        accuracy, negative_loss, l2 = max(tried)
        best = {"accuracy": accuracy, "loss": -negative_loss, "l2": l2}
        write_json(file, best)
        return best

    with torch.random.fork_rng(devices=[]):
        return job.team.on_main(fit)


def below_probe(accuracy: float, probe: dict[str, float] | None) -> str:
    """What to say of a result that the plain linear probe beats; nothing where it does not."""
    if probe is None or accuracy >= probe["accuracy"]:
        return ""
    return (
        f"below the plain linear probe ({probe['accuracy']:.4f} on the same images): fine-tuning made these "
        f"features worse. Try train=head, probe.epochs= before it (LP-FT), or a lower optimizer.lr"
    )
