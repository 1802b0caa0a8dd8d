"""Re-basin of bundles: their hidden units put into the first one's order, as files to merge."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from tldist.bundle import WEIGHTS
from tldist.errors import RecipeError
from tldist.files import atomic_folder
from tldist.fuse.in_weights import Merge, head_rows
from tldist.fuse.job import Job
from tldist.fuse.rebasin.align import RebasinSettings, align_to_first
from tldist.fuse.rebasin.spec import permute
from tldist.fuse.weights.files import open_weights
from tldist.models.description import build_model, with_outputs
from tldist.models.heads import find_head
from tldist.models.load import save_tensors
from tldist.models.weights import read_tensors
from tldist.progress import say
from tldist.training.ledger import LEDGER, Ledger


def with_aligned(job: Job, merge: Merge) -> tuple[Merge, dict[str, Any]]:
    """The merge of the same models with their hidden units in one order; called by all processes together.

    Of models that know different classes, the rows of the common ones take part in the matching.

    Raises:
        RecipeError: no class is known to all; or activations are to be matched and there are no images.
        ModelError: the architecture cannot be aligned.
    """
    config = job.parents[0].config
    known = [job.labels.known[number] for number in merge.members]
    common = [name for name in known[0] if all(name in names for names in known)]
    if config.classes and not common:
        raise RecipeError("method=rebasin needs a class that all bundles know: their heads are compared.")
    described = with_outputs(config.model, len(common)) if common else config.model
    model = build_model(described, trust_code=job.recipe.trust_code).to(job.team.device)
    heads = head_rows(job, find_head(model)[0])
    whole = [read_tensors(job.parents[number].folder / WEIGHTS) for number in merge.members]
    compared = [_with_rows(tensors, heads, names, common) for tensors, names in zip(whole, known)]
    recipe = job.recipe
    found = align_to_first(
        compared,
        [job.parents[number].label for number in merge.members],
        model,
        config.preprocessing,
        job.team,
        RebasinSettings(
            recipe.match,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            most_batches=-(-(job.walk().samples or 1) // recipe.batch_size),
            workers=job.workers,
        ),
        domain=job.train,
        ledger=Ledger(job.train, job.folder.path / LEDGER) if job.train else None,
    )
    for row in found.notes["models"]:
        before, after = row["similarity_before"], row["similarity_after"]
        say(f"aligned {row['label']}: {row['moved']:,} units moved, cosine {before:.3f} -> {after:.3f}")
    files = [job.parents[merge.members[0]].weights]
    for number, tensors, permutations in zip(merge.members[1:], whole[1:], found.permutations):
        folder = job.work / f"aligned-{number}"
        job.team.on_main(partial(_write, permute(tensors, found.spec, permutations), folder))
        files.append(open_weights(folder))
    return replace(merge, files=tuple(files)), {"rebasin": found.notes}


def _write(tensors: dict[str, Tensor], folder: Path) -> None:
    with atomic_folder(folder) as temporary:
        save_tensors(tensors, temporary / WEIGHTS)


def _with_rows(
    tensors: dict[str, Tensor], heads: list[str], names: tuple[str, ...], common: list[str]
) -> dict[str, Tensor]:
    """The same tensors with the heads' rows of the common classes alone, in one order."""
    rows = [names.index(name) for name in common]
    return {name: tensor[rows] if name in heads else tensor for name, tensor in tensors.items()}
