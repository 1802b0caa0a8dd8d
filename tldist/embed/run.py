"""Embed: find the model, cut the domain into units, do what is missing, sum up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tldist.domain import Domain, open_domain
from tldist.embed.claims import Claims
from tldist.embed.engine import Model, Team, find_model, join, load_engine
from tldist.embed.layout import (
    LOCK,
    MANIFEST,
    UNITS,
    Manifest,
    check_same_vectors,
    done_units,
    find_leftovers,
    part_path,
    read_manifest,
    read_record,
)
from tldist.embed.pipeline import decoder, decoding_threads
from tldist.embed.recipe import EmbedRecipe
from tldist.embed.verify import verify_folder
from tldist.embed.work import Work, check_broken
from tldist.errors import RecipeError
from tldist.progress import is_main, progress_bar, show_plan, warn
from tldist.runs import RECIPE, Outcome, RunFolder, recorded
from tldist.training.signals import stop_on_signals


def run(recipe: EmbedRecipe) -> Outcome:
    """Embed a domain; the same call, on any number of processes, does what is missing.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    if recipe.verify:
        return verify_folder(recipe.out)
    assert recipe.data is not None  # the recipe is refused without
    model = find_model(recipe)
    team = join(model)
    domain = open_domain(recipe.data)
    manifest = plan_manifest(recipe, model, domain)
    folder = RunFolder(recipe.out, "embed")
    start = time.perf_counter()
    with open_folder(recipe, manifest) as claims, recorded(folder, is_main()), stop_on_signals() as stop:
        missing = sorted(set(range(manifest.units)) - done_units(recipe.out))
        finished = not missing and folder.summary.get("status") == "done"
        if missing:
            _show(recipe, model, domain, manifest, missing, team)
            embed = load_engine(model, recipe, team)
            threads = decoding_threads(recipe.workers, team.local_size)
            todo = sum(len(manifest.rows_of(unit)) for unit in missing)
            with (
                decoder(domain, model.preprocessing, recipe.batch_size, threads) as decoding,
                progress_bar(manifest.rows, "img", "embed", done=manifest.rows - todo) as bar,
            ):
                Work(recipe.out, manifest, domain, embed, decoding, claims, bar, stop).run(missing)
        team.wait()
        if not finished:
            sum_up(folder, manifest, domain, claims, time.perf_counter() - start)
        claims.path.unlink(missing_ok=True)  # nothing is left to claim
    return _outcome(folder, finished)


def plan_manifest(recipe: EmbedRecipe, model: Model, domain: Domain) -> Manifest:
    """What the folder shall hold; the same in every process and at every start."""
    inputs: dict[str, Any] = {
        "model": model.identity,
        "engine": model.engine,
        "preprocessing": model.preprocessing.to_dict(),
        "data": domain.fingerprint,
        "unit_rows": recipe.unit_rows,
        "batch_size": recipe.batch_size,
        "dtype": recipe.dtype,
        "precision": recipe.precision,
    }
    return Manifest(inputs, len(domain), recipe.unit_rows)


@contextmanager
def open_folder(recipe: EmbedRecipe, manifest: Manifest) -> Iterator[Claims]:
    """Make the folder of vectors, or go on in the one that is there; processes may do so together.

    Raises:
        RecipeError: it holds other files, or vectors of another model, preprocessing or domain.
    """
    out = recipe.out
    _check_folder(out, manifest)
    (out / UNITS).mkdir(parents=True, exist_ok=True)
    claims = Claims(out)
    try:
        with claims.alone():
            _check_folder(out, manifest)  # again: another process may just have made it
            if not (out / MANIFEST).exists():
                manifest.write(out)
            _remove_leftovers(out, claims)
            if is_main():
                recipe.write(out / RECIPE)
        yield claims
    finally:
        claims.close()


def _check_folder(out: Path, manifest: Manifest) -> None:
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is a file; out= takes a folder.")
    names = {entry.name for entry in out.iterdir()} if out.exists() else set()
    if MANIFEST in names:
        check_same_vectors(out, read_manifest(out), manifest)
    elif any(name not in (LOCK, UNITS) and not name.startswith(".tmp-") for name in names):
        raise RecipeError(f"{out} exists and is not a folder of vectors; choose another out= or remove it.")


def _remove_leftovers(out: Path, claims: Claims) -> None:
    """Remove what killed processes left half-written; a unit that is claimed is being written now."""
    for path, unit in find_leftovers(out):
        if unit is None:
            path.unlink(missing_ok=True)
        elif claims.take(unit):
            path.unlink(missing_ok=True)
            claims.give_back(unit)


def sum_up(folder: RunFolder, manifest: Manifest, domain: Domain, claims: Claims, seconds: float) -> None:
    """Count what all units hold and write ``summary.json``; whoever comes first does it for all.

    Raises:
        DomainError: more broken images than the domain's limit.
    """
    with claims.alone():
        _remove_leftovers(folder.path, claims)  # of a process that was lost meanwhile
        records = [read_record(folder.path, unit) for unit in range(manifest.units)]
        bad = [entry for record in records for entry in record.bad]
        check_broken(domain, len(bad), lambda: bad[0], at_least=False)
        if folder.summary.get("status") == "done":
            return
        width = pq.read_schema(part_path(folder.path, 0)).field("embedding").type.list_size
        folder.write_summary(
            "done",
            rows=sum(record.rows for record in records),
            bad=len(bad),
            units=manifest.units,
            dimensions=width,
            dtype=manifest.inputs["dtype"],
            engine=manifest.inputs["engine"],
            fingerprint=manifest.fingerprint,
            seconds=round(seconds, 1),
        )


def _show(
    recipe: EmbedRecipe, model: Model, domain: Domain, manifest: Manifest, missing: list[int], team: Team
) -> None:
    splits = ", ".join(f"{name} {count:,}" for name, count in domain.split_counts.items())
    how, done = model.preprocessing, manifest.units - len(missing)
    computed = "ONNX Runtime, as exported" if model.engine == "onnx" else f"PyTorch, {recipe.precision}"
    show_plan(
        "embed",
        {
            "model": f"{model.path} ({how.height}x{how.width} pixels)",
            "engine": computed,
            "data": f"{domain.name}: {len(domain):,} images ({splits})",
            "units": f"{manifest.units:,} of {recipe.unit_rows:,} images, {done:,} done already",
            "batch": f"{recipe.batch_size} images",
            "vectors": f"{recipe.dtype}, in {recipe.out}/part-*.parquet",
            "processes": team.size,
            "decoding": f"{decoding_threads(recipe.workers, team.local_size)} threads a process",
        },
    )
    if recipe.unit_rows % recipe.batch_size and manifest.units > 1:
        warn("unit_rows is not a multiple of batch_size: the last batch of every unit is filled up in vain.")


def _outcome(folder: RunFolder, finished: bool) -> Outcome:
    names = ("rows", "bad", "units", "dimensions", "dtype", "engine", "seconds")
    values = {name: folder.summary.get(name) for name in names}
    text = f"{values['rows']:,} vectors of {values['dimensions']} numbers, {values['bad']} broken images"
    text += "; finished already" if finished else f", in {values['seconds']} s"
    return Outcome("embed", folder.path, values, text, f"tldist embed out={folder.path} verify=true")
