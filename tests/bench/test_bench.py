"""``tldist bench``: figures that are consistent, variants that compute the model, words where one cannot."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.embed.tiny import tiny_package
from tests.support_export import damage, edit_record, write_bundle_of
from tldist import api
from tldist.bench.recipe import DEFAULTS, WORDS, BenchRecipe
from tldist.bench.timing import take_turns
from tldist.bench.torch_variants import TorchModel, forget_compiled
from tldist.errors import PackageError, RecipeError
from tldist.files import sha256_file
from tldist.models.load import load_bundle
from tldist.runtime.preprocess import normalize
from tldist.runtime.reference import read_reference, write_reference

QUICK = {"batches": (1, 3), "seconds": 0.04, "rounds": 2}
VARIANTS = ("channels_last", "bf16", "bf16_weights+channels_last")


def test_bench__figures_are_consistent(exported: tuple[Path, Path], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    outcome = api.bench(package=exported[1], variants=VARIANTS, out=tmp_path / "run", **QUICK)
    rows = outcome.values["rows"]
    assert outcome.passed
    assert [row["variant"] for row in rows] == ["onnxruntime", "eager", *VARIANTS] * 2
    for row in rows:
        assert not row["failed"]
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
        assert 0 < row["median_ms"] <= row["p99_ms"] < math.inf
        assert row["error"] <= row["tolerance"]
        eager = next(r for r in rows if r["batch"] == row["batch"] and r["variant"] == "eager")
        assert row["ratio"] == pytest.approx(eager["median_ms"] / row["median_ms"])
    ratios = [row["ratio"] for row in rows if row["variant"] == "onnxruntime"]
    assert outcome.values["speed_up"] == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    assert outcome.values["runtime"]["provider"] == "CPUExecutionProvider"
    assert outcome.values["runtime"]["threads"] == 1
    assert sum(outcome.values["runtime"]["placement"]["CPUExecutionProvider"].values()) > 20
    assert json.loads(outcome.to_json())["stage"] == "bench"
    assert torch.get_num_threads() == threads
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["rows"] == rows
    picture = (tmp_path / "run/bench.svg").read_text()
    assert picture.count(">3: ") == 5
    again = api.bench(package=exported[1], variants=VARIANTS, out=tmp_path / "run", **QUICK)
    assert again.values["rows"] == rows
    assert "finished before" in again.text


@pytest.mark.parametrize("name", [name for name in DEFAULTS["cpu"] if name != "compile"])
@pytest.mark.parametrize("output", ["logits", "features"])
def test_variants__compute_the_bundle(exported: tuple[Path, Path], name: str, output: str) -> None:
    """Against float64, by the module's own layers."""
    model, config = load_bundle(exported[0])
    how = config.preprocessing
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    inputs = torch.from_numpy(normalize(images, how.mean, how.std)).double()
    with torch.no_grad():
        maps = model.double().features(inputs)
        expected = model.classifier(maps).flatten(1) if output == "logits" else maps.mean((2, 3))
        if output == "features":
            expected = torch.nn.functional.normalize(expected)
    found = TorchModel(exported[0], output, output == "features", "cpu", False).variant(name)(images)
    assert found.dtype == np.float32
    error = np.abs(found - expected.numpy()).max() / np.abs(expected.numpy()).max()
    assert error < (0.05 if "bf16" in name else 1e-5)
    assert (error > 1e-4) == ("bf16" in name), "the precision is the one that the name says"


def test_variants__layout_and_precision_are_those_of_the_name(exported: tuple[Path, Path]) -> None:
    seen: dict[str, tuple[torch.dtype, bool, bool]] = {}
    for name in ("eager", "channels_last", "bf16", "bf16_weights+channels_last"):
        handles = []

        def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if (
                isinstance(module, torch.nn.Conv2d)
                and module.in_channels > 3
                and module.kernel_size == (3, 3)
            ):
                last = output.is_contiguous(memory_format=torch.channels_last)
                weights = module.weight.is_contiguous(memory_format=torch.channels_last)
                seen.setdefault(name, (output.dtype, last, weights))  # noqa: B023

        handles.append(torch.nn.modules.module.register_module_forward_hook(keep))
        try:
            TorchModel(exported[0], "logits", False, "cpu", False).variant(name)(
                np.zeros((2, 40, 40, 3), np.uint8)
            )
        finally:
            handles[0].remove()
    assert seen == {
        "eager": (torch.float32, False, False),
        "channels_last": (torch.float32, True, True),
        "bf16": (torch.bfloat16, False, False),
        "bf16_weights+channels_last": (torch.bfloat16, True, True),
    }


def test_bench__a_package_that_computes_something_else_fails(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """Its self-test passes: it is held to what it answered itself. PyTorch's answers tell."""
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    record = json.loads((copy / "package.json").read_text())
    edit_record(copy, profile=record["profile"] | {"tolerances": {"max_relative": 1e-12, "max_drift": 1e-3}})
    stored = read_reference(copy / "reference.safetensors")
    write_reference(copy / "reference.safetensors", replace(stored, exported=stored.expected, referee={}))
    edit_record(copy, files={"reference.safetensors": sha256_file(copy / "reference.safetensors")})
    outcome = api.bench(package=copy, variants=("eager",), out=tmp_path / "run", **QUICK)
    assert not outcome.passed
    assert "onnxruntime is off by" in outcome.text
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "failed"


def test_bench__finds_the_bundle_or_says_why_not(
    exported: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_bundle_of(tmp_path / "other", "squeezenet1_1", seed=1)
    with pytest.raises(RecipeError, match="is not the bundle that the package was made from"):
        api.bench(package=exported[1], bundle=str(other), **QUICK)
    copy = shutil.copytree(exported[1], tmp_path / "copy")
    lineage = json.loads((copy / "package.json").read_text())["lineage"]
    lineage["parents"][0]["path"] = str(other)
    relabelled = damage(copy, tmp_path / "relabelled", lambda proto: relabel(proto, lineage))
    edit_record(relabelled, lineage=lineage)
    outcome = api.bench(package=relabelled, **QUICK)
    assert [row["variant"] for row in outcome.values["rows"]] == ["onnxruntime"] * 2
    assert "measured alone, without PyTorch" in capsys.readouterr().err
    given = api.bench(package=relabelled, bundle=str(exported[0]), variants=("eager",), **QUICK)
    assert len(given.values["rows"]) == 4


def relabel(proto: object, lineage: dict[str, object]) -> None:
    """Give the graph's metadata another lineage."""
    for entry in proto.metadata_props:  # type: ignore[attr-defined]
        if entry.key == "lineage":
            entry.value = json.dumps(lineage, ensure_ascii=False)


def test_bench__a_package_without_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    for kind in ("fixed", "picture"):
        package = tiny_package(tmp_path / kind, weights, kind=kind)  # type: ignore[arg-type]
        outcome = api.bench(package=package, out=tmp_path / f"{kind}-run", **QUICK)
        assert outcome.passed
        assert outcome.values["speed_up"] is None
    assert "names no bundle" in capsys.readouterr().err
    assert "images per second" in (tmp_path / "fixed-run/bench.svg").read_text()


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a convolution and two products."""
    return write_bundle_of(tmp_path_factory.mktemp("compile") / "b", "tests.support_export:float_only")


@pytest.mark.parametrize("compiler", ["g++", "/nowhere/g++"])
def test_compile__computes_the_same_or_says_why_not(network: Path, compiler: str) -> None:
    if compiler == "g++" and shutil.which(compiler) is None:
        pytest.skip("no g++ here")
    images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    model = TorchModel(network, "logits", False, "cpu", trust_code=True)
    names = ("eager", "compile+channels_last")
    forget_compiled()
    with torch._inductor.config.patch({"cpp.cxx": (compiler,), "fx_graph_cache": False}):
        timings = take_turns({name: partial(model.variant, name) for name in names}, images, 1e-3, 1)
    eager, compiled = (timings[name] for name in names)
    if compiler == "g++":
        assert compiled.first > 10 * eager.first, "it was compiled"
        np.testing.assert_allclose(compiled.output, eager.output, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]
    else:
        assert compiled.failed
        assert compiled.output is None
        assert eager.calls


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batches": ()}, "batches are different numbers"),
        ({"batches": (1, 0)}, "batches are different numbers"),
        ({"batches": (2, 2)}, "batches are different numbers"),
        ({"variants": ("eager+chanels_last",)}, "Did you mean: channels_last"),
        ({"variants": ("bf16+fp16",)}, "more than one precision"),
        ({"seconds": 0}, "seconds"),
        ({"threads": 0}, "threads"),
    ],
)
def test_recipe__mistakes_are_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        BenchRecipe.make(package="p", **settings)


def test_recipe__variants() -> None:
    assert {word for names in DEFAULTS.values() for name in names for word in name.split("+")} <= set(WORDS)
    assert BenchRecipe.make(package="p", variants=("compile", "eager")).variants_on("cpu") == (
        "eager",
        "compile",
    )
    assert BenchRecipe.make(package="p").variants_on("cuda")[0] == "eager"


def test_bench__no_package(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="no such folder"):
        api.bench(package=tmp_path / "none")
