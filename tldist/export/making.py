"""The part of export that needs torch: from a bundle to the files of a package, proved before they stay."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from tldist import __version__
from tldist.bundle import WEIGHTS, BundleConfig, parent_record
from tldist.errors import CheckFailed
from tldist.export.agreement import Resize
from tldist.export.answers import answer
from tldist.export.certificate import certify, library_versions
from tldist.export.converter import Converted, convert, resize_inside
from tldist.export.explain import explain
from tldist.export.graph import ExportGraph, load_graph
from tldist.export.judge import answers_alone, judge
from tldist.export.onnx_file import save, written
from tldist.export.precision.lower import Lowered, lower
from tldist.export.profile import Profile
from tldist.export.recipe import ExportRecipe
from tldist.export.samples import calibration_images, gather_samples
from tldist.export.verdict import Verdict
from tldist.export.whole import answer_pictures
from tldist.files import write_json
from tldist.progress import say
from tldist.runtime.package import FEATURES, LOGITS, MODEL, PARITY, REFERENCE, PackageConfig, open_graph
from tldist.runtime.reference import Reference, thin, write_reference
from tldist.runtime.session import Session, open_session


@dataclass(frozen=True)
class Job:
    """What an export works with.

    Attributes:
        recipe, profile: the settings.
        folder, bundle: what is exported.
        graph: its module.
    """

    recipe: ExportRecipe
    profile: Profile
    folder: Path
    bundle: BundleConfig
    graph: ExportGraph


def make_package(
    recipe: ExportRecipe, profile: Profile, folder: Path, bundle: BundleConfig, out: Path
) -> tuple[PackageConfig, Verdict]:
    """Write the graph, the reference samples and the certificate of a package.

    Args:
        recipe, profile: the settings.
        folder, bundle: what is exported.
        out: an empty folder.

    Returns:
        What the package is, and the verdict, which passed.

    Raises:
        CheckFailed: the graph does not agree with the bundle, in the profile's precision.
        ModelError: the model cannot be exported as the recipe says.
    """
    graph, _ = load_graph(
        folder,
        recipe.outputs,
        pool=recipe.pool,
        l2=recipe.l2,
        input=recipe.input,
        trust_code=recipe.trust_code,
        verify=False,
    )
    job = Job(recipe, profile, folder, bundle, graph)
    reference = _ask(job)
    converted = _convert(job)
    lowered = _lower(job, converted, reference)
    config = _describe(job, converted, lowered, reference)
    save(lowered.proto, out / MODEL, config.graph_metadata())
    session = open_graph(out, config)
    reference, verdict = _judge(job, out, session, reference)
    stored = thin(reference)
    write_reference(out / REFERENCE, stored.with_exported(answers_alone(session, stored.samples)))
    write_json(out / PARITY, certify(verdict, out, config))
    return config, verdict


def _ask(job: Job) -> Reference:
    """PyTorch's answers to images of the size that the network takes."""
    takes = "fixed" if job.recipe.input == "picture" else job.recipe.input
    how, count = job.bundle.preprocessing, job.recipe.count(job.profile)
    return answer(job.graph, gather_samples(job.recipe.data, count, how, takes))


def _convert(job: Job) -> Converted:
    start = time.monotonic()
    converted = convert(job.graph, job.profile.opset, job.recipe.exporter)
    for exporter, reason in converted.refused:
        say(f"{exporter} is not used: {reason}")
    nodes, seconds = len(converted.proto.graph.node), time.monotonic() - start
    say(f"converted by {converted.exporter} to {nodes} nodes, opset {converted.opset}, in {seconds:.1f} s")
    return converted


def _lower(job: Job, converted: Converted, reference: Reference) -> Lowered:
    """In the profile's precision; and then with the resize in front, if the graph takes pictures."""
    recipe, how = job.recipe, job.bundle.preprocessing
    pictures = reference.samples.groups[0][1]
    lowered = lower(
        converted.proto,
        job.profile,
        judge=_judge_of(job, reference),
        judged=reference.samples.images[:pictures],
        calibration=calibration_images(recipe.calibration, recipe.data, job.profile, how),
        optimize=recipe.optimize,
    )
    if recipe.input == "picture":
        resize_inside(lowered.proto, how)
    return lowered


def _judge_of(job: Job, reference: Reference) -> Callable[[onnx.ModelProto], list[str]]:
    """What parity finds wrong in a graph that takes images of one size, on the profile's provider."""
    profile, bundle = job.profile, job.bundle

    def find_faults(proto: onnx.ModelProto) -> list[str]:
        with written(proto) as path:
            session = open_session(path, provider=profile.provider, provider_options=profile.provider_options)
            agreements = judge(
                session, reference, profile.tolerances, task=bundle.task, temperature=bundle.temperature
            )
        return [f"{part.output}: {fault}" for part in agreements for fault in part.faults]

    return find_faults


def _judge(job: Job, out: Path, session: Session, reference: Reference) -> tuple[Reference, Verdict]:
    """The verdict on the graph as it lies in the package, and what it was compared with.

    Raises:
        CheckFailed: it does not agree; the first node that departs is named.
    """
    resize: Resize | None = None
    if job.recipe.input == "picture":
        count, how = job.recipe.count(job.profile), job.bundle.preprocessing
        samples = gather_samples(job.recipe.data, count, how, "picture")
        reference, resize, _ = answer_pictures(job.graph, out / MODEL, samples, session.provider)
    agreements = judge(
        session,
        replace(reference, fitted={}),  # PyTorch is asked about the graph's own pixels: nothing to allow for
        job.profile.tolerances,
        task=job.bundle.task,
        temperature=job.bundle.temperature,
    )
    groups, ids = reference.samples.groups, reference.samples.ids
    verdict = Verdict("PyTorch", agreements, groups, session.provider, ids=ids, resize=resize)
    if not verdict.passed:
        verdict = explain(verdict, job.graph, out / MODEL, session, reference, job.profile)
        raise CheckFailed(
            f"the exported graph does not agree with {job.folder}; nothing was written to {job.recipe.out}.\n"
            f"{verdict.to_text()}"
        )
    return reference, verdict


def _describe(job: Job, converted: Converted, lowered: Lowered, reference: Reference) -> PackageConfig:
    recipe, bundle = job.recipe, job.bundle
    outputs = {name: int(values.shape[1]) for name, values in reference.expected.items()}
    features = any(name.startswith(FEATURES) for name in outputs)
    return PackageConfig(
        classes=bundle.classes if LOGITS in outputs else (),
        preprocessing=bundle.preprocessing,
        temperature=bundle.temperature,
        task=bundle.task,
        outputs=outputs,
        profile=job.profile.model_dump(mode="json"),
        bundle={"identity": bundle.identity, "weights": bundle.files[WEIGHTS]},
        lineage={
            "stage": "export",
            "recipe": recipe.model_dump(mode="json"),
            "parents": [parent_record(job.folder, bundle)],
            "bundle": bundle.lineage,
        },
        versions={
            "tldist": __version__,
            "python": platform.python_version(),
            **library_versions(),
        },
        input=recipe.input,
        features={"pool": recipe.pool, "l2": recipe.l2} if features else {},
        exporter=converted.to_dict(),
        steps=lowered.to_dicts(),
    )
