"""Who takes part in a bench: the package, and its bundle in the variants of PyTorch where that is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tldist.bench.recipe import BenchRecipe
from tldist.bench.table import ONNX
from tldist.bench.timing import Run
from tldist.bundle import read_bundle
from tldist.errors import MissingExtra, PackageError, RecipeError, TldistError, needs
from tldist.progress import warn
from tldist.runtime.package import FEATURES, LOGITS, Package
from tldist.runtime.preprocess import fit

Contenders = dict[str, Callable[[], Run]]
"""What builds each one, by name."""


def gather(recipe: BenchRecipe, package: Package, device: str) -> Contenders:
    """The package; and PyTorch, or the reason why not is said.

    Raises:
        TldistError: the bundle that was given is another one, or damaged.
    """
    own: Contenders = {ONNX: partial(_package_run, package)}
    try:
        bundle = _find_bundle(recipe, package)
        _check_comparable(package)
        with needs("train"):
            from tldist.bench.torch_variants import TorchModel
        output = first_output(package)
        l2 = output == FEATURES and bool(_part(package.config.lineage.get("recipe")).get("l2"))
        model = TorchModel(bundle, output, l2, device, recipe.trust_code)
    except TldistError as error:
        if recipe.bundle is not None and not isinstance(error, MissingExtra):
            raise
        warn(f"ONNX Runtime is measured alone, without PyTorch: {error}")
        return own
    names = recipe.variants_on(device)
    return own | {name: partial(_torch_run, partial(model.variant, name), package) for name in names}


def first_output(package: Package) -> str:
    """The output that is compared: logits, else features, else the graph's first."""
    names = [name for name in (LOGITS, FEATURES) if name in package.config.outputs]
    return (names or list(package.config.outputs))[0]


def _find_bundle(recipe: BenchRecipe, package: Package) -> Path:
    """The bundle that the package was made from: as given, or as its lineage names it."""
    parents = package.config.lineage.get("parents")
    path = recipe.bundle or _part(parents[0] if isinstance(parents, list) and parents else None).get("path")
    if not isinstance(path, str):
        raise RecipeError("the package names no bundle that it was made from; give it: bundle=B")
    folder, config = read_bundle(path, verify=False)  # hashes are checked when the weights are read
    if config.identity != package.config.bundle["identity"]:
        raise RecipeError(f"{folder} is not the bundle that the package was made from; give that: bundle=B")
    return folder


def _part(value: object) -> dict[str, Any]:
    """A part of a lineage, which a file can say anything in."""
    return value if isinstance(value, dict) else {}


def _check_comparable(package: Package) -> None:
    if first_output(package) not in (LOGITS, FEATURES):
        raise PackageError(
            f"the package gives {', '.join(package.config.outputs)}: neither {LOGITS} nor {FEATURES}."
        )


def _package_run(package: Package) -> Run:
    name = first_output(package)
    return lambda images: package.run(images)[name]


def _torch_run(build: Callable[[], Run], package: Package) -> Run:
    """PyTorch, on what the package's graph makes of the images where it resizes them itself."""
    run, how = build(), package.config.preprocessing
    if package.config.input != "picture":
        return run
    return lambda images: run(np.stack([fit(Image.fromarray(image), how) for image in images]))


@contextmanager
def torch_threads(count: int, contenders: Contenders) -> Iterator[None]:
    """While inside, PyTorch uses so many threads, if it takes part."""
    if len(contenders) == 1:
        yield
        return
    from tldist.bench.torch_variants import threads

    with threads(count):
        yield


def forget_compiled(contenders: Contenders) -> None:
    """Before another batch size: torch.compile keeps few versions of one function, and then gives up."""
    if len(contenders) > 1:
        import tldist.bench.torch_variants as variants

        variants.forget_compiled()
