"""Examine machine, libraries, ONNX Runtime and job; say what is broken and what to do."""

from __future__ import annotations

from pathlib import Path

from tldist import __version__
from tldist.doctor.finding import Check, Finding
from tldist.doctor.job import check_job
from tldist.doctor.libraries import check_libraries
from tldist.doctor.machine import check_machine
from tldist.doctor.recipe import DoctorRecipe
from tldist.doctor.runtime import check_runtime
from tldist.runs import Outcome


def run(recipe: DoctorRecipe) -> Outcome:
    """Run every check; ``passed`` is False where something is broken (exit code 1)."""
    machine = check_machine(Path.cwd())
    checks = {
        "machine": machine,
        "libraries": check_libraries(),
        "runtime": check_runtime(has_gpu=bool(machine.facts["gpus"])),
        "job": check_job(),
    }
    findings = [finding for check in checks.values() for finding in check.findings]
    broken = [finding for finding in findings if finding.level == "broken"]
    values = {name: check.facts for name, check in checks.items()}
    return Outcome(
        "doctor",
        values={**values, "findings": [finding.to_dict() for finding in findings]},
        text=_page(list(checks.values()), findings, len(broken)),
        passed=not broken,
    )


def _page(checks: list[Check], findings: list[Finding], num_broken: int) -> str:
    """One page for a person: the facts, then the findings, the broken things first."""
    lines = [f"tldist {__version__}", *(f"  {line}" for check in checks for line in check.lines)]
    for finding in sorted(findings, key=lambda finding: finding.level != "broken"):
        lines += [f"{finding.level}: {finding.what}", f"  do: {finding.todo}"]
    verdict = f"{num_broken} broken" if num_broken else "nothing is broken"
    return "\n".join([*lines, f"doctor: {verdict}"])
