"""Merge safetensors files or folders that are no bundles: any models with equal tensor names and shapes.

Nothing here imports torch, unless a launcher has started several processes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tldist.errors import RecipeError
from tldist.files import canonical_json, sha256_text
from tldist.fuse.crew import Alone, Crew, merge_together
from tldist.fuse.recipe import FuseRecipe
from tldist.fuse.settings import check_recipe, is_of_tensors, make_settings, say_unused, weight_method
from tldist.fuse.weights.files import INDEX, Weights, open_weights
from tldist.fuse.weights.targets import Fusion, plan_targets
from tldist.process import core_count
from tldist.progress import show_plan, warn
from tldist.runs import Outcome, RunFolder, open_run, recorded

RESULT = "weights"
"""The folder in the run that holds the merged files."""
_BESIDE = (".json", ".txt")
_LARGEST_BESIDE = 64 << 20
_HASHED_AT_ONCE = 1 << 20


def run_raw(recipe: FuseRecipe) -> Outcome:
    """Merge files; the same call again says that it is done.

    Raises:
        TldistError: see `tldist.errors`; nothing half-written stays.
    """
    fusion = _plan(recipe)
    crew = _join()
    folder = _open(recipe, fusion, crew)
    if folder.finished:
        return _outcome(folder, f"{folder.path} is finished already.")
    with recorded(folder, crew.rank == 0), _hashing(fusion, recipe.hash and crew.rank == 0) as hashes:
        _show(recipe, fusion)
        begin = time.perf_counter()
        total = merge_together(
            fusion,
            recipe.out / RESULT,
            crew,
            metadata={"format": "pt", "tldist": canonical_json(_lineage(recipe, fusion))},
            shard_bytes=int(recipe.shard_gb * 1e9) if recipe.shard_gb else None,
            add=lambda result: _copy_beside(Path(recipe.bundles[0]), result),
        )
        if crew.rank == 0:
            seconds = round(time.perf_counter() - begin, 3)
            folder.write_summary(
                "done",
                weights=RESULT,
                method=recipe.method,
                tensors=len(fusion.models[0].entries),
                bytes=total,
                seconds=seconds,
                processes=crew.size,
                lineage={**_lineage(recipe, fusion), "blake3": hashes()},
            )
        crew.wait()
    return _outcome(folder, "")


def _plan(recipe: FuseRecipe) -> Fusion:
    """What is merged, all headers read and compared."""
    method = weight_method(recipe.method)
    if not is_of_tensors(recipe.method, method):
        raise RecipeError(f"method={recipe.method} needs bundles: raw=true knows tensors, not models.")
    check_recipe(recipe, method)
    say_unused(recipe, method.uses)
    if recipe.data is not None:
        warn("data= is not used: raw=true knows tensors, not models")
    models = [open_weights(path) for path in recipe.bundles]
    base = open_weights(recipe.base) if recipe.base is not None and "base" in method.uses else None
    fusion = Fusion(models, base, method, make_settings(recipe, method))
    plan_targets(fusion)
    return fusion


def _join() -> Crew:
    """The job that a launcher started, or one process without torch."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone()
    from tldist import distributed

    return distributed.start()


def _open(recipe: FuseRecipe, fusion: Fusion, crew: Crew) -> RunFolder:
    inputs = {"models": _shape_of(fusion.models), "base": _shape_of([fusion.base] if fusion.base else [])}
    folder = open_run("fuse", recipe.out, recipe, inputs) if crew.rank == 0 else None
    found: RunFolder = crew.gather(folder)[0]
    return found


def _shape_of(models: Sequence[Weights]) -> str:
    """What the headers say: names, types, shapes. Contents are hashed beside the merge."""
    rows = [[[e.name, e.dtype, *e.shape] for e in model.entries.values()] for model in models]
    return sha256_text(canonical_json(rows))


@contextmanager
def _hashing(fusion: Fusion, enabled: bool) -> Iterator[Callable[[], dict[str, str] | None]]:
    """Hash the inputs on threads of their own while the merge goes on."""
    if not enabled:
        yield lambda: None
        return
    files = [str(file) for model in fusion.everyone for file in model.files]
    with ThreadPoolExecutor(core_count()) as pool:
        found: dict[str, Future[str]] = {file: pool.submit(_blake3, file) for file in files}
        try:
            yield lambda: {file: future.result() for file, future in found.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _blake3(file: str) -> str:
    """Hex BLAKE3 of a file (what ``b3sum`` prints): SHA-256 would take longer than the merge."""
    from blake3 import blake3

    digest, buffer = blake3(), bytearray(_HASHED_AT_ONCE)
    with Path(file).open("rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:size])
    return str(digest.hexdigest())


def _copy_beside(source: Path, result: Path) -> None:
    """Take over what a folder of weights has beside them: its configuration, so that the result loads."""
    if not source.is_dir():
        return
    for file in sorted(source.iterdir()):
        small = file.is_file() and file.suffix in _BESIDE and file.stat().st_size <= _LARGEST_BESIDE
        if small and file.name != INDEX:
            shutil.copyfile(file, result / file.name)


def _lineage(recipe: FuseRecipe, fusion: Fusion) -> dict[str, Any]:
    settings = ("alpha", "scale", "density", "gamma", "seed")
    return {
        "method": recipe.method,
        "parents": [model.label for model in fusion.models],
        "base": fusion.base.label if fusion.base else None,
        "weights": list(fusion.settings.weights),
        **{name: getattr(fusion.settings, name) for name in settings if name in fusion.method.uses},
    }


def _show(recipe: FuseRecipe, fusion: Fusion) -> None:
    rows = {f"model {n}": f"{m.label} ({len(m.files)} files)" for n, m in enumerate(fusion.models, 1)}
    show_plan(
        "fuse (raw)",
        {
            "method": recipe.method,
            **({"base": fusion.base.label} if fusion.base else {}),
            **rows,
            "tensors": len(fusion.models[0].entries),
            "out": recipe.out,
        },
    )


def _outcome(folder: RunFolder, note: str) -> Outcome:
    summary = folder.summary
    keys = ("method", "tensors", "bytes", "seconds", "processes")
    values = {"weights": str(folder.path / RESULT), **{name: summary.get(name) for name in keys}}
    lines = [note] if note else []
    if summary.get("seconds"):
        written = summary["bytes"] / 1e9
        lines.append(
            f"{summary['tensors']} tensors, {written:.2f} GB in {summary['seconds']:.2f} s "
            f"({written / summary['seconds']:.2f} GB/s written): {folder.path / RESULT}"
        )
    return Outcome("fuse", folder.path, values, "\n".join(lines))
