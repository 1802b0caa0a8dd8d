"""`tldist fuse ... raw=true` from outside: any safetensors, without torch, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from safetensors.numpy import load_file, save_file

from tests.support import run_tldist
from tests.support_processes import run_ranks
from tldist import api
from tldist.errors import BundleError, RecipeError
from tldist.files import sha256_file


def make(folder: Path, seed: int, tensors: int = 3, side: int = 40) -> Path:
    """A folder as Hugging Face writes it: two shards, an index, a configuration."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    found = {f"layer.{n}.weight": rng.standard_normal((side, side), dtype=np.float32) for n in range(tensors)}
    names = sorted(found)
    table = {}
    for number, part in enumerate((names[:1], names[1:]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: found[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in found.values())
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text('{"model_type": "resnet"}')
    return folder


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [make(tmp_path / f"m{n}", n) for n in range(3)]


def test_raw__shards_in_one_file_out(tmp_path: Path, models: list[Path]) -> None:
    outcome = api.fuse(bundles=models, method="average", raw=True, weights=(1, 1, 2), out=tmp_path / "run")
    found = load_file(tmp_path / "run" / "weights" / "model.safetensors")
    parents = [tensors_of(model) for model in models]
    for name, tensor in found.items():
        expected = (parents[0][name] + parents[1][name].astype(float) + 2 * parents[2][name]) / 4
        np.testing.assert_allclose(tensor, expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == parents[0].keys()
    assert (tmp_path / "run" / "weights" / "config.json").read_text() == '{"model_type": "resnet"}'
    assert not (tmp_path / "run" / "weights" / "model.safetensors.index.json").exists()
    assert outcome.values["tensors"] == 3
    lineage = json.loads((tmp_path / "run" / "summary.json").read_text())["lineage"]
    shard = models[1] / "model-00002-of-00002.safetensors"
    assert lineage["blake3"][str(shard)] == blake3(shard.read_bytes()).hexdigest()
    assert lineage["parents"] == [str(model) for model in models]
    assert lineage["weights"] == [1, 1, 2]


def test_raw__output_in_shards(tmp_path: Path, models: list[Path]) -> None:
    api.fuse(bundles=models[:2], base=models[2], method="ties", raw=True, shard_gb=7e-6, out=tmp_path / "r")
    result = tmp_path / "r" / "weights"
    assert len(list(result.glob("model-*-of-00003.safetensors"))) == 3
    index = json.loads((result / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(models[0]).keys()


def test_raw__needs_no_torch(tmp_path: Path, models: list[Path]) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from tldist import cli; "
        f"cli.main(['fuse', {str(models[0])!r}, {str(models[1])!r}, 'method=average', 'raw=true', "
        f"'out={tmp_path / 'run'}'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "run" / "weights" / "model.safetensors").is_file()


def test_raw__bundles_are_folders_of_safetensors_too(tmp_path: Path) -> None:
    from tests.support_models import make_bundle

    bundles = [make_bundle(tmp_path / f"b{n}", ("x", "y"), name="squeezenet1_1", seed=n) for n in range(2)]
    api.fuse(bundles=bundles, method="average", raw=True, out=tmp_path / "raw")
    api.fuse(bundles=bundles, method="average", out=tmp_path / "whole")
    raw = load_file(tmp_path / "raw" / "weights" / "model.safetensors")
    whole = load_file(tmp_path / "whole" / "bundle" / "model.safetensors")
    assert all(np.array_equal(raw[name], tensor) for name, tensor in whole.items())


def test_raw__again_says_that_it_is_finished(tmp_path: Path, models: list[Path]) -> None:
    for number in range(2):
        done = run_tldist("fuse", *models, "method=average", "raw=true", f"out={tmp_path / 'r'}", "--json")
        assert done.returncode == 0, done.stderr
        assert ("finished already" in done.stdout) == bool(number)
    with pytest.raises(RecipeError, match="method"):
        api.fuse(bundles=models, method="multi_slerp", raw=True, out=tmp_path / "r")


def _fuse(models: list[Path], out: Path) -> int:
    values = api.fuse(bundles=models[:2], base=models[2], method="dare_ties", raw=True, out=out).values
    return int(values["processes"])


def test_raw__two_processes_write_what_one_does(tmp_path: Path, models: list[Path]) -> None:
    assert run_ranks(_fuse, 1, models, tmp_path / "one") == [1]
    assert run_ranks(_fuse, 2, models, tmp_path / "two") == [2, 2]
    one, two = (tmp_path / name / "weights" / "model.safetensors" for name in ("one", "two"))
    first, second = load_file(one), load_file(two)
    assert all(np.array_equal(first[name], tensor) for name, tensor in second.items())


def test_raw__killed_at_any_moment_leaves_all_or_nothing(tmp_path: Path) -> None:
    models = [make(tmp_path / f"big{n}", n, tensors=40, side=700) for n in range(3)]

    def start(out: Path) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "tldist",
            "fuse",
            *map(str, models),
            "method=multi_slerp",
            "raw=true",
        ]
        pipe = subprocess.DEVNULL
        return subprocess.Popen([*command, f"out={out}"], stdout=pipe, stderr=pipe)

    begin = time.monotonic()
    assert start(tmp_path / "undisturbed").wait() == 0
    seconds = time.monotonic() - begin
    expected = sha256_file(tmp_path / "undisturbed" / "weights" / "model.safetensors")
    found = set()
    for number, part in enumerate(np.linspace(0.1, 1.05, 10)):
        out = tmp_path / f"run{number}"
        child = start(out)
        time.sleep(seconds * part)
        child.kill()
        child.wait()
        found.add((out / "weights").exists())
        if (out / "weights").exists():
            assert sha256_file(out / "weights" / "model.safetensors") == expected
        assert start(out).wait() == 0
        assert sha256_file(out / "weights" / "model.safetensors") == expected
        assert not list(out.glob(".tmp-*"))
    assert False in found


# -- refusals ----------------------------------------------------------------------------------------------


def test_raw__refuses_what_knows_models(tmp_path: Path, models: list[Path]) -> None:
    for method in ("greedy_soup", "ensemble", "adamerging"):
        with pytest.raises(RecipeError, match="needs bundles"):
            api.fuse(bundles=models, base=models[0], method=method, raw=True, out=tmp_path / "r")
    with pytest.raises(RecipeError, match="fuses 2 bundles; 3 were given"):
        api.fuse(bundles=models, method="slerp", raw=True, out=tmp_path / "r")
    with pytest.raises(BundleError, match="do not hold the same tensors"):
        api.fuse(
            bundles=[models[0], make(tmp_path / "m9", 9, tensors=4)],
            method="average",
            raw=True,
            out=tmp_path / "r",
        )
    assert not (tmp_path / "r").exists()
