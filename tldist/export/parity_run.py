"""``tldist parity``: compare a package with its bundle, or with the samples stored in it (no torch)."""

from __future__ import annotations

from pathlib import Path

from tldist.bundle import BundleConfig, read_bundle
from tldist.errors import PackageError, RecipeError, TldistError, needs
from tldist.export.profile import Profile
from tldist.export.recipe import ParityRecipe
from tldist.export.samples import gather_samples
from tldist.export.verdict import Verdict, judge
from tldist.files import read_json
from tldist.progress import say
from tldist.runs import Outcome
from tldist.runtime.package import (
    CONFIG,
    MODEL,
    PARITY,
    REFERENCE,
    PackageConfig,
    file_problems,
    graph_problems,
    is_package,
    open_graph,
    read_package,
)
from tldist.runtime.reference import Reference, Samples, read_reference
from tldist.runtime.session import Session

MOST_IMAGES = 64
"""Pictures of a domain that are compared where data.limit says nothing."""


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
    """Against the samples in the package."""
    problems = _package_problems(folder, config)
    session, reference = _load_graph(folder, config, problems), _load_reference(folder, problems)
    return _verdict("the answers of PyTorch stored in the package", session, reference, config, problems)


def _with_torch(recipe: ParityRecipe, folder: Path, config: PackageConfig) -> Verdict:
    """Against the bundle itself."""
    path, bundle = read_bundle(recipe.models[0], verify=False)
    problems = [*_package_problems(folder, config), *file_problems(path, bundle.files)]
    problems += _record_problems(bundle, config)
    with needs("train"):
        from tldist.export import converter
    graph, _ = converter.load_graph(path, tuple(config.outputs), trust_code=recipe.trust_code, verify=False)
    session = _load_graph(folder, config, problems)
    samples = _choose_samples(recipe, folder, bundle)
    say(f"asking PyTorch about {len(samples.images)} images, in float32 and float64")
    return _verdict("PyTorch", session, converter.answer(graph, samples), config, problems)


def _choose_samples(recipe: ParityRecipe, folder: Path, bundle: BundleConfig) -> Samples:
    """A domain's images, else the ones stored in the package, else generated ones."""
    how = bundle.preprocessing
    if recipe.data is not None:
        return gather_samples(recipe.data, recipe.data.limit or MOST_IMAGES, how)
    ignored: list[str] = []  # a damaged file of samples is among the problems already, by its hash
    stored = _load_reference(folder, ignored)
    if stored and stored.samples.images.shape[1:] == (how.height, how.width, 3):
        return stored.samples
    return gather_samples(None, MOST_IMAGES, how)


def _verdict(
    against: str,
    session: Session | None,
    reference: Reference | None,
    config: PackageConfig,
    problems: list[str],
) -> Verdict:
    groups = reference.samples.groups if reference else ()
    if session is None or reference is None:
        return Verdict(against, (), groups, str(config.profile.get("provider")), tuple(problems))
    if not session.takes(reference.samples.images.shape[1:]) or set(reference.expected) != set(
        session.outputs
    ):
        problems.append("the samples and the graph have other sizes or outputs: nothing can be compared.")
        return Verdict(against, (), groups, session.provider, tuple(problems))
    try:
        profile = Profile.make(**config.profile)
    except RecipeError as error:
        raise PackageError(f"{CONFIG}: the profile in it is malformed: {error}") from error
    agreements = judge(session, reference, profile.tolerances)
    return Verdict(against, agreements, groups, session.provider, tuple(problems))


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
    problems = file_problems(folder, config.files)
    try:
        certificate = read_json(folder / PARITY, PackageError, "parity report")
    except TldistError as error:
        return [*problems, str(error)]
    certified = certificate.get("files", {}).get(MODEL), certificate.get("bundle")
    if certified != (config.files.get(MODEL), config.bundle):
        problems.append(f"{folder / PARITY}: certifies another graph, or another bundle.")
    return problems


def _record_problems(bundle: BundleConfig, config: PackageConfig) -> list[str]:
    """Where the package says something else than its bundle."""
    problems = []
    if config.classes and config.classes != bundle.classes:
        problems.append(f"the class names differ: bundle {bundle.classes}, package {config.classes}.")
    if config.preprocessing != bundle.preprocessing:
        problems.append(
            f"the preprocessing differs: bundle {bundle.preprocessing}, package {config.preprocessing}."
        )
    if config.bundle["identity"] != bundle.identity:
        problems.append("the package was made from another bundle (or the bundle has changed since).")
    return problems
