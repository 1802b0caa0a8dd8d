"""The rules of the house that a machine can check: what imports what, what is documented."""

from __future__ import annotations

import ast
import json
import pkgutil
import re
import shlex
import tomllib
from itertools import chain
from pathlib import Path

import pytest

import tldist
from tests.support import REPOSITORY, run_python
from tldist.recipe import Recipe, walk_fields
from tldist.settings_help import describe_settings
from tldist.stages import STAGES, load_recipe_class

HEAVY = ("torch", "torchvision", "accelerate")
BASE = (
    "tldist.errors",
    "tldist.files",
    "tldist.process",
    "tldist.recipe",
    "tldist.settings_help",
    "tldist.bundle",
    "tldist.progress",
    "tldist.pictures",
    "tldist.runs",
    "tldist.share",
    "tldist.methods",
    "tldist.stages",
    "tldist.api",
    "tldist.cli",
)
TORCH_FREE_ROOMS = (
    "tldist.domain.",
    "tldist.runtime.",
    "tldist.embed.",
    "tldist.report.",
    "tldist.doctor.",
    "tldist.export.",
    "tldist.serve.",
    "tldist.bench.",
    "tldist.fuse.weights.",
    "tldist.fuse.raw.",
)
NEED_TORCH = {
    "tldist.embed.torch_engine": "embeds with a bundle",
    "tldist.export.graph": "is the module that is converted",
    "tldist.export.conversion_check": "asks the module that was converted",
    "tldist.bench.torch_variants": "runs the bundle beside the package",
    "tldist.export.answers": "asks the bundle",
    "tldist.export.bisect": "runs the module operation by operation",
    "tldist.export.converter": "traces the module that it converts",
    "tldist.export.making": "puts the parts of an export together",
    "tldist.export.parity_torch": "asks the bundle",
    "tldist.export.program": "runs the module operation by operation",
    "tldist.export.skew": "runs the loader of training",
    "tldist.export.whole": "asks the bundle",
}
"""The modules of these rooms that may import torch, and why."""


def all_modules() -> list[str]:
    """Every module of the package but ``__main__``."""
    found = pkgutil.walk_packages(tldist.__path__, "tldist.")
    return sorted(module.name for module in found if not module.name.endswith("__main__"))


def torch_free_modules() -> list[str]:
    """What must be importable on a machine without torch."""
    return [
        name
        for name in all_modules()
        if (name in BASE or f"{name}.".startswith(TORCH_FREE_ROOMS) or name.endswith(".recipe"))
        and name not in NEED_TORCH
    ]


IMPORT_ALL = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    sys.modules[name] = None
problems = {}
for name in json.loads(sys.argv[2]):
    try:
        importlib.import_module(name)
    except Exception as error:
        problems[name] = f"{type(error).__name__}: {error}"
print(json.dumps(problems))
"""


def import_without_torch(modules: list[str]) -> dict[str, str]:
    """The modules that cannot be imported where torch is missing, with the reason."""
    answer = run_python(IMPORT_ALL, json.dumps(HEAVY), json.dumps(modules))
    assert answer.returncode == 0, answer.stderr
    problems: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    return problems


def test_torch_free__every_module_of_the_list_imports() -> None:
    modules = torch_free_modules()
    assert set(BASE) <= set(modules)
    assert {
        f"tldist.{stage}.recipe" for stage in STAGES if (Path(tldist.__path__[0]) / stage).is_dir()
    } <= set(modules)
    assert import_without_torch(modules) == {}


def test_torch_free__the_blockade_bites() -> None:
    problems = import_without_torch(["tldist.models.zoo", *NEED_TORCH])
    assert set(problems) == {"tldist.models.zoo", *NEED_TORCH}, "a module listed as needing torch does not"


LOADED = """
import contextlib, io, json, sys
from tldist.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    main(sys.argv[1:])
heavy = ("torch", "numpy", "pydantic", "yaml", "accelerate")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""


def test_help__of_the_command_imports_nothing_heavy() -> None:
    answer = run_python(LOADED, "--help")
    assert json.loads(answer.stdout) == [], answer.stderr


@pytest.mark.parametrize("stage", ["finetune", "export", "embed"])
def test_help__of_a_stage_needs_no_torch(stage: str) -> None:
    answer = run_python(LOADED, stage, "--help")
    assert {"torch", "accelerate"}.isdisjoint(json.loads(answer.stdout)), answer.stderr


@pytest.mark.parametrize("name", STAGES)
def test_help__documents_every_field(name: str) -> None:
    recipe = load_recipe_class(STAGES[name])
    words = " ".join(describe_settings(recipe).split())
    for setting, field in walk_fields(recipe):
        assert field.description, f"{setting} has no sentence under it"
        assert f"{setting} (" in words
        assert " ".join(field.description.split()) in words
    assert (recipe.__doc__ or "").strip()
    assert recipe.__doc__ != Recipe.__doc__


def test_recipes__name_inputs_that_are_fields() -> None:
    for stage in STAGES.values():
        recipe = load_recipe_class(stage)
        for slot in recipe.inputs:
            assert slot.rstrip("*") in recipe.model_fields
        assert all(not slot.endswith("*") for slot in recipe.inputs[:-1]), "what follows * gets nothing"


def test_modules__each_opens_with_a_sentence() -> None:
    for path in sorted(Path(tldist.__path__[0]).rglob("*.py")):
        sentence = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        first = sentence.split("\n\n")[0]
        assert first, f"{path}: no module docstring"
        assert first.rstrip().endswith((".", ":", "::")) or path.name == "errors.py", f"{path}: {first!r}"


def test_package__says_what_is_public() -> None:
    for name in tldist.__all__:
        assert hasattr(tldist, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        tldist.nonsense  # noqa: B018


def test_constraints__name_what_pyproject_needs_and_no_place() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.split("==") for line in text.splitlines() if line and not line.startswith("#"))
    normal = {re.sub(r"[-_.]+", "-", name).lower() for name in pins}
    needed = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[<>=!~;\[ ]", need)[0].lower() for need in needed} - {"tldist"}
    # one of the two builds of ONNX Runtime is tested: the one that pyproject takes on Linux x86-64
    assert names - normal == {"onnxruntime"}
    assert "/" not in "".join(pins.values()), "a pin is a version, not a place"


# -- commands in the documentation ---------------------------------------------------------------------

DOCUMENTS = [
    path
    for path in [
        *REPOSITORY.glob("*.md"),
        *(REPOSITORY / "docs").rglob("*.md"),
        *REPOSITORY.glob("*/README.md"),
        REPOSITORY / "export" / "serving.md",
    ]
    if path.name != "CHANGELOG.md"
]
_COMMAND = re.compile(
    r"^\s*(?:\$ )?(?:tldist|accelerate launch .*?-m tldist|python -m tldist)\s+([a-z]+)(.*)$"
)


def documented_commands(path: Path) -> list[tuple[str, str]]:
    """(stage, its arguments) of the commands in the code blocks of a Markdown file."""
    found = []
    blocks = re.findall(
        r"```(?:bash|sh|console|text|)\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL
    )
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        match = _COMMAND.match(line.split("  #")[0])
        if match:
            found.append((match[1], match[2]))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_documents__commands_name_stages_and_settings_that_exist(document: Path) -> None:
    for stage, rest in documented_commands(document):
        assert stage in STAGES, f"{document.name}: tldist {stage}"
        recipe = load_recipe_class(STAGES[stage])
        names = {name for name, _ in walk_fields(recipe)}
        groups = {name.rsplit(".", 1)[0] for name in names if "." in name}
        for word in shlex.split(rest, comments=True):
            key = word.strip("[]").partition("=")[0]
            if "=" in word and re.fullmatch(r"[a-z_][a-z0-9_.]*", key):
                assert key in names | groups, f"{document.name}: tldist {stage} {key}="
