"""The Dockerfile, as far as it can be judged without a container engine: its stages, and what they copy."""

from __future__ import annotations

import re
import shlex
import tomllib

from tests.support import REPOSITORY

KNOWN = re.compile("ARG|CMD|COPY|ENTRYPOINT|ENV|EXPOSE|FROM|HEALTHCHECK|LABEL|RUN|SHELL|USER|VOLUME|WORKDIR")


def read_stages() -> dict[str, list[tuple[str, str]]]:
    """By stage: its (instruction, arguments), those of the stages that it builds on first."""
    text = (REPOSITORY / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    stages: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction, _, rest = line.strip().partition(" ")
        assert KNOWN.fullmatch(instruction), line
        if instruction == "FROM":
            origin, _, name = rest.partition(" AS ")
            assert re.fullmatch(r"[a-z-]+", name), line
            stages[name] = list(stages.get(origin, [("FROM", origin)]))
        else:
            stages[name].append((instruction, rest))
    return stages


def run_lines(stage: str) -> str:
    """All shell lines of a stage."""
    return "\n".join(rest for instruction, rest in read_stages()[stage] if instruction == "RUN")


def test_targets__neither_runs_as_root() -> None:
    for target in ("train", "serve"):
        users = [rest for instruction, rest in read_stages()[target] if instruction == "USER"]
        assert users
        assert users[-1] not in ("root", "0")
        assert f"useradd --create-home --uid 1000 {users[-1]}" in run_lines(target)


def test_targets__start_tldist() -> None:
    for target in ("train", "serve"):
        entry = [rest for instruction, rest in read_stages()[target] if instruction == "ENTRYPOINT"]
        assert entry[-1] == '["tldist"]'


def test_serve__installs_no_extra_that_brings_torch_and_proves_it() -> None:
    lines = run_lines("serve")
    extras = re.findall(r"\.\[([^\]]+)\]", lines)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    names = {name.replace("$RUNTIME", "gpu") for extra in extras for name in extra.split(",")}
    assert names <= set(optional)
    assert not any(re.match(r"torch|tldist", need) for name in names for need in optional[name])
    assert '! python -c "import torch"' in lines


def test_libraries__are_installed_before_the_code_is_copied() -> None:
    for target in ("train", "serve"):
        steps = [f"{instruction} {rest}" for instruction, rest in read_stages()[target]]
        libraries = next(i for i, step in enumerate(steps) if "-c constraints.txt" in step)
        code = steps.index("COPY . .")
        assert libraries < code, "a changed line of code must not install PyTorch again"
        assert "--no-deps" in "\n".join(steps[code:])


def test_copied__files_exist_and_are_not_ignored() -> None:
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    for steps in read_stages().values():
        for instruction, rest in steps:
            if instruction == "COPY" and not rest.startswith(". "):
                for source in shlex.split(rest)[:-1]:
                    assert (REPOSITORY / source).exists(), source
                    assert source not in ignored
    assert not {"tldist", "launch", "export", "pyproject.toml", "README.md", "LICENSE"} & set(ignored)
