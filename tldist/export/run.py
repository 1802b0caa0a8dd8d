"""``tldist export``: load the bundle, convert it, prove the graph equal, and only then write the package."""

from __future__ import annotations

import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tldist import __version__
from tldist.bundle import WEIGHTS, BundleConfig, parent_record, read_bundle
from tldist.errors import CheckFailed, RecipeError, needs
from tldist.export.certificate import certify
from tldist.export.explain import explain
from tldist.export.judge import answers_alone, judge
from tldist.export.profile import Profile, find_profile
from tldist.export.recipe import ExportRecipe
from tldist.export.samples import gather_samples
from tldist.export.verdict import Verdict
from tldist.files import atomic_folder, read_json, write_json
from tldist.progress import say, show_plan
from tldist.recipe import check_same_run
from tldist.runs import Outcome
from tldist.runtime.package import (
    LOGITS,
    MODEL,
    PARITY,
    REFERENCE,
    PackageConfig,
    is_package,
    open_graph,
    read_package,
    write_package,
)
from tldist.runtime.reference import Reference, thin, write_reference
from tldist.runtime.session import Session, require_provider


def run(recipe: ExportRecipe) -> Outcome:
    """Export a bundle.

    Raises:
        CheckFailed: the graph does not agree with the bundle; nothing is written.
        TldistError: the bundle, the profile, the data or this machine is not what the recipe says.
    """
    profile = find_profile(recipe.profile)
    folder, bundle = read_bundle(recipe.bundle)
    if finished := _finished(recipe, profile, bundle):
        return finished
    outputs = _outputs(recipe, bundle)
    with needs("train"):  # the package's other modules run without torch, and so does `tldist parity PACKAGE`
        from tldist.export import converter
        from tldist.export.answers import answer
    require_provider(profile.provider, profile.provider_options)
    graph, _ = converter.load_graph(folder, outputs, trust_code=recipe.trust_code, verify=False)
    _show_plan(recipe, profile, folder, bundle, outputs)

    reference = answer(graph, gather_samples(recipe.data, recipe.samples, bundle.preprocessing))
    start = time.monotonic()
    proto = converter.convert(graph, profile.opset)
    say(f"converted to {len(proto.graph.node)} nodes in {time.monotonic() - start:.1f} s")

    config = _describe(recipe, profile, folder, bundle, reference)
    with atomic_folder(recipe.out) as temporary:
        converter.save(proto, temporary / MODEL, config.graph_metadata())
        session = open_graph(temporary, config)
        verdict = _judge(session, config, profile, reference)
        if not verdict.passed:
            verdict = explain(verdict, graph, temporary / MODEL, session, reference, profile)
            raise CheckFailed(
                f"the exported graph does not agree with {folder}; nothing was written to {recipe.out}.\n"
                f"{verdict.to_text()}"
            )
        stored = thin(reference)
        write_reference(temporary / REFERENCE, stored.with_exported(answers_alone(session, stored.samples)))
        write_json(temporary / PARITY, certify(verdict, temporary, config))
        written = write_package(temporary, config)
    return _outcome(recipe.out, written, verdict.to_dict(pairs=False), verdict.to_text())


def _outputs(recipe: ExportRecipe, bundle: BundleConfig) -> tuple[str, ...]:
    if LOGITS in recipe.outputs and not bundle.classes:
        words = ",".join(recipe.output)
        raise RecipeError(f"output={words}: the bundle has no classes; use output=features.")
    return recipe.outputs


def _finished(recipe: ExportRecipe, profile: Profile, bundle: BundleConfig) -> Outcome | None:
    """What an earlier, equal export left at ``out``.

    Raises:
        RecipeError: ``out`` holds something else.
    """
    if not recipe.out.exists() or (recipe.out.is_dir() and not any(recipe.out.iterdir())):
        return None
    if not is_package(recipe.out):
        raise RecipeError(f"{recipe.out} exists and is not a package; choose another out= or remove it.")
    there = read_package(recipe.out)
    if there.bundle["identity"] != bundle.identity:
        raise RecipeError(f"{recipe.out} holds the package of another bundle; choose another out=.")
    if there.profile != profile.model_dump(mode="json"):
        raise RecipeError(
            f"{recipe.out} was made with another profile, or an older text of it ({there.profile_name}); "
            f"choose another out=."
        )
    before = ExportRecipe.make(**there.lineage["recipe"])
    if (before.data is None) != (recipe.data is None):
        was = "generated pictures" if before.data is None else f"pictures of {before.data.path}"
        raise RecipeError(f"{recipe.out} was compared on {was}; set data= back, or choose another out=.")
    check_same_run(recipe.out, before, recipe)
    certificate = read_json(recipe.out / PARITY, RecipeError, "parity report")
    values = {name: value for name, value in certificate.items() if name != "outputs"}
    return _outcome(recipe.out, there, values, f"finished before: {recipe.out} is complete.\nparity: PASS")


def _show_plan(
    recipe: ExportRecipe, profile: Profile, folder: Path, bundle: BundleConfig, outputs: tuple[str, ...]
) -> None:
    how = bundle.preprocessing
    source = f"{recipe.samples} of {recipe.data.path}" if recipe.data else f"{recipe.samples} generated"
    show_plan(
        "export",
        {
            "bundle": f"{folder} ({len(bundle.classes)} classes)",
            "profile": f"{profile.name}: {profile.precision} on {profile.provider}",
            "input": f"uint8 (batch, {how.height}, {how.width}, 3), normalised inside the graph",
            "outputs": ", ".join(outputs),
            "parity": f"on {source}{'' if recipe.data else ' (data= takes real ones)'}, black, white, noise",
        },
    )


def _describe(
    recipe: ExportRecipe, profile: Profile, folder: Path, bundle: BundleConfig, reference: Reference
) -> PackageConfig:
    widths = {name: int(values.shape[1]) for name, values in reference.expected.items()}
    libraries = ("torch", "onnx", "onnxscript", "numpy", "pillow")
    return PackageConfig(
        classes=bundle.classes if LOGITS in widths else (),
        preprocessing=bundle.preprocessing,
        temperature=bundle.temperature,
        task=bundle.task,
        outputs=widths,
        profile=profile.model_dump(mode="json"),
        bundle={"identity": bundle.identity, "weights": bundle.files[WEIGHTS]},
        lineage={
            "stage": "export",
            "recipe": recipe.model_dump(mode="json"),
            "parents": [parent_record(folder, bundle)],
            "bundle": bundle.lineage,
        },
        versions={
            "tldist": __version__,
            "python": platform.python_version(),
            **{library: version(library) for library in libraries},
        },
    )


def _judge(session: Session, config: PackageConfig, profile: Profile, reference: Reference) -> Verdict:
    agreements = judge(
        session, reference, profile.tolerances, task=config.task, temperature=config.temperature
    )
    samples = reference.samples
    return Verdict("PyTorch", agreements, samples.groups, session.provider, ids=samples.ids)


def _outcome(out: Path, config: PackageConfig, values: dict[str, Any], text: str) -> Outcome:
    about = {
        "package": config.identity,
        "bytes": (out / MODEL).stat().st_size,
        "profile": config.profile_name,
    }
    return Outcome("export", out, {**values, **about}, text, next_command=f"tldist parity {out}")
