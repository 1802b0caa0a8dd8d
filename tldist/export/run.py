"""``tldist export``: load the bundle, convert it, prove the graph equal, and only then write the package."""

from __future__ import annotations

from tldist.bundle import BundleConfig, read_bundle
from tldist.errors import RecipeError, needs
from tldist.export.finished import find_finished
from tldist.export.profile import find_profile
from tldist.export.recipe import ExportRecipe
from tldist.export.triton import write_triton
from tldist.export.words import outcome, plan_of, steps_table
from tldist.files import atomic_folder, read_json
from tldist.progress import say, show_plan
from tldist.runs import Outcome
from tldist.runtime.package import LOGITS, PARITY, PackageConfig, write_package
from tldist.runtime.session import require_provider


def run(recipe: ExportRecipe) -> Outcome:
    """Export a bundle.

    Raises:
        CheckFailed: the graph does not agree with the bundle; nothing is written.
        TldistError: the bundle, the profile, the data or this machine is not what the recipe says.
    """
    profile = find_profile(recipe.profile)
    folder, bundle = read_bundle(recipe.bundle)
    if there := find_finished(recipe, profile, bundle):
        return _finished(recipe, there)
    _check(recipe, bundle)
    with needs("train"):  # the package's other modules run without torch, and so does `tldist parity PACKAGE`
        from tldist.export.making import make_package
    require_provider(profile.provider, profile.provider_options)
    show_plan("export", plan_of(recipe, profile, folder, bundle))
    with atomic_folder(recipe.out) as temporary:
        config, verdict = make_package(recipe, profile, folder, bundle, temporary)
        written = write_package(temporary, config)
    _write_triton(recipe)
    text = "\n".join([*steps_table(config.steps), verdict.to_text()])
    return outcome(recipe.out, written, verdict.to_dict(pairs=False), text)


def _check(recipe: ExportRecipe, bundle: BundleConfig) -> None:
    if LOGITS in recipe.outputs and not bundle.classes:
        words = ",".join(recipe.output)
        raise RecipeError(f"output={words}: the bundle has no classes; use output=features.")
    if not recipe.outputs:
        raise RecipeError("output= is empty, and so is layers=: the graph would give nothing.")


def _finished(recipe: ExportRecipe, there: PackageConfig) -> Outcome:
    _write_triton(recipe)
    certificate = read_json(recipe.out / PARITY, RecipeError, "parity report")
    values = {name: value for name, value in certificate.items() if name != "outputs"}
    return outcome(recipe.out, there, values, f"finished before: {recipe.out} is complete.\nparity: PASS")


def _write_triton(recipe: ExportRecipe) -> None:
    if recipe.triton is not None:
        say(f"Triton model: {write_triton(recipe.out, recipe.triton)}")
