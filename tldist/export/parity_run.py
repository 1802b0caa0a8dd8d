"""``tldist parity``: compare a package with its bundle, or with the samples stored in it (no torch)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tldist.bundle import BundleConfig, read_bundle
from tldist.errors import PackageError, RecipeError, needs
from tldist.export.agreement import Agreement
from tldist.export.certificate import certificate_problems, machine_difference
from tldist.export.explain import explain
from tldist.export.judge import judge
from tldist.export.profile import Profile
from tldist.export.recipe import ParityRecipe
from tldist.export.verdict import Verdict
from tldist.runs import Outcome
from tldist.runtime.package import (
    CONFIG,
    MODEL,
    REFERENCE,
    PackageConfig,
    file_problems,
    graph_problems,
    is_package,
    open_graph,
    read_package,
)
from tldist.runtime.reference import Reference, read_reference
from tldist.runtime.session import CPU, Session


def run(recipe: ParityRecipe) -> Outcome:
    """Compare; a package that disagrees, or is damaged, is an outcome that did not pass.

    Raises:
        TldistError: there is nothing to compare: no package, no bundle, no such provider here.
    """
    folder = Path(recipe.models[-1])
    if len(recipe.models) == 2 and is_package(recipe.models[0]) and not is_package(folder):
        raise RecipeError("the inputs are in the wrong order: tldist parity BUNDLE PACKAGE.")
    config = read_package(folder, verify=False)
    verdict = _with_torch(recipe, folder, config) if len(recipe.models) == 2 else _stored(folder, config)
    values = {**verdict.to_dict(pairs=False), "package": config.identity}
    return Outcome("parity", None, values, verdict.to_text(), passed=verdict.passed)


def _stored(folder: Path, config: PackageConfig) -> Verdict:
    """Against the samples in the package: PyTorch's answers, and its own where it was made."""
    problems = _package_problems(folder, config)
    session, reference = _load_graph(folder, config, problems), _load_reference(folder, problems)
    verdict = _verdict("the answers stored in the package", session, reference, config, problems)
    difference = "" if verdict.values_agree else machine_difference(folder)
    return replace(verdict, notes=(*verdict.notes, difference)) if difference else verdict


def _with_torch(recipe: ParityRecipe, folder: Path, config: PackageConfig) -> Verdict:
    """Against the bundle itself."""
    path, bundle = read_bundle(recipe.models[0], verify=False)
    problems = [*_package_problems(folder, config), *file_problems(path, bundle.files)]
    problems += _record_problems(bundle, config)
    with needs("train"):
        from tldist.export.parity_torch import ask_pytorch
    session = _load_graph(folder, config, problems)
    ignored: list[str] = []  # a damaged file of samples is among the problems already, by its hash
    stored = _load_reference(folder, ignored)
    asked = ask_pytorch(
        path,
        bundle,
        folder,
        config,
        session.provider if session else CPU,
        data=recipe.data,
        stored=stored.samples if stored else None,
        trust_code=recipe.trust_code,
    )
    problems += asked.problems
    verdict = _verdict("PyTorch", session, asked.reference, config, problems)
    verdict = replace(verdict, files=asked.files, resize=asked.resize)
    failed = [part for part in verdict.agreements if not part.passed]
    if session is None or asked.reference is None or not failed:
        return verdict
    return explain(verdict, asked.graph, folder / MODEL, session, asked.reference, _profile(config))


def _verdict(
    against: str,
    session: Session | None,
    reference: Reference | None,
    config: PackageConfig,
    problems: list[str],
) -> Verdict:
    groups, ids = (reference.samples.groups, reference.samples.ids) if reference else ((), ())
    agreements: tuple[Agreement, ...] = ()
    provider = session.provider if session else str(config.profile.get("provider"))
    if session is not None and reference is not None and _fits(session, reference):
        tolerances = _profile(config).tolerances
        agreements = judge(session, reference, tolerances, task=config.task, temperature=config.temperature)
    elif session is not None and reference is not None:
        problems.append("the samples and the graph have other sizes or outputs: nothing can be compared.")
    return Verdict(against, agreements, groups, provider, tuple(problems), ids)


def _fits(session: Session, reference: Reference) -> bool:
    """Whether the graph takes the samples, and gives what was answered for them."""
    takes = all(session.takes(images.shape[1:]) for _, images in reference.samples.by_size())
    return takes and set(reference.expected) == set(session.outputs)


def _profile(config: PackageConfig) -> Profile:
    try:
        return Profile.make(**config.profile)
    except RecipeError as error:
        raise PackageError(f"{CONFIG}: the profile in it is malformed: {error}") from error


def _load_graph(folder: Path, config: PackageConfig, problems: list[str]) -> Session | None:
    """The graph, and what contradicts its record; a graph that does not load is a problem too."""
    try:
        session = open_graph(folder, config)
    except PackageError as error:
        problems.append(str(error))
        return None
    problems += [f"{folder / MODEL}: {problem}" for problem in graph_problems(session, config)]
    return session


def _load_reference(folder: Path, problems: list[str]) -> Reference | None:
    try:
        return read_reference(folder / REFERENCE)
    except PackageError as error:
        problems.append(str(error))
        return None


def _package_problems(folder: Path, config: PackageConfig) -> list[str]:
    """Hashes that differ, and a certificate that is about something else."""
    return [*file_problems(folder, config.files), *certificate_problems(folder, config)]


def _record_problems(bundle: BundleConfig, config: PackageConfig) -> list[str]:
    """Where the package says something else than its bundle."""
    problems = []
    if config.classes and config.classes != bundle.classes:
        problems.append(f"the class names differ: bundle {bundle.classes}, package {config.classes}.")
    if config.preprocessing != bundle.preprocessing:
        problems.append(
            f"the preprocessing differs: bundle {bundle.preprocessing}, package {config.preprocessing}."
        )
    if config.classes and (config.temperature, config.task) != (bundle.temperature, bundle.task):
        problems.append(
            f"the decisions differ: bundle {bundle.task} at temperature {bundle.temperature}, "
            f"package {config.task} at {config.temperature}."
        )
    if config.bundle["identity"] != bundle.identity:
        problems.append("the package was made from another bundle (or the bundle has changed since).")
    return problems
