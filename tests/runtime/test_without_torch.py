"""What serves runs where torch cannot be imported."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np

from tests.embed.tiny import tiny_package
from tests.support import make_images, run_python

_HEAD = """
import sys
for name in ("torch", "torchvision", "accelerate", "onnx", "onnxscript", "pyarrow", *{more!r}):
    sys.modules[name] = None
"""

_PREDICT = """
from tldist import Package
from tldist.runtime.predict import predict
package = Package.open({package!r}, threads=1)
for found in predict(package, [{image!r}]):
    print(found.label, found.probability)
"""

_SERVE = """
from tldist import Package
from tldist.runtime.predict import features, predict
package = Package.open({package!r}, threads=1, spinning=False, warm_up=(1, 2))
package.self_test(samples=None)
found = predict(package, [{image!r}, b"no image"], errors="return", workers=2)
print(package.describe()["provider"], found[0].label, found[1], features(package, [{image!r}]).shape)
"""

_PICTURES = """
import numpy as np
from tldist import Package
from tldist.runtime.predict import features
package = Package.open({package!r}, threads=1)
pictures = [np.full((5 + number % 2, 7, 3), number, np.uint8) for number in range(6)]
one = features(package, [np.ones((2, 2, 3), np.uint8)])
print(np.allclose(features(package, pictures, 2), np.arange(6)[:, None] * one, atol=1e-4))
"""

_COMMAND = """
from tldist.cli import main
raise SystemExit(main({arguments!r}))
"""

_PARITY = """
from tldist.cli import main
raise SystemExit(main(["parity", *{arguments!r}]))
"""


def run_without(script: str, more: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return run_python(_HEAD.format(more=more) + script)


def test_predict__without_torch(exported: tuple[Path, Path], tmp_path: Path) -> None:
    image = next(make_images(tmp_path, {"a": 1}).glob("a/*.png"))
    done = run_without(_PREDICT.format(package=str(exported[1]), image=str(image)))
    assert done.returncode == 0, done.stderr
    assert 0 < float(done.stdout.rsplit(maxsplit=1)[1]) <= 1


def test_parity__without_torch(exported: tuple[Path, Path]) -> None:
    done = run_without(_PARITY.format(arguments=[str(exported[1])]))
    assert done.returncode == 0, done.stderr
    assert "parity: PASS" in done.stdout.splitlines()
    assert not done.stderr


def test_parity__against_the_bundle_names_the_extra(exported: tuple[Path, Path]) -> None:
    done = run_without(_PARITY.format(arguments=[str(path) for path in exported]))
    assert done.returncode == 2
    assert "tldist[train]" in done.stderr


def test_parity__without_onnxruntime_names_the_extra(exported: tuple[Path, Path]) -> None:
    done = run_without(_PARITY.format(arguments=[str(exported[1])]), more=("onnxruntime",))
    assert done.returncode == 2
    assert "tldist[cpu]" in done.stderr
    assert "Traceback" not in done.stderr


def test_serving__without_torch(exported: tuple[Path, Path], tmp_path: Path) -> None:
    image = next(make_images(tmp_path, {"a": 1}).glob("a/*.png"))
    done = run_without(_SERVE.format(package=str(exported[1]), image=str(image)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CPUExecutionProvider ")
    assert "source 1: not an image" in done.stdout
    assert done.stdout.rstrip().endswith("(1, 512)")


def test_whole_pictures__without_torch(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    package = tiny_package(tmp_path / "package", weights, kind="picture")
    done = run_without(_PICTURES.format(package=str(package)))
    assert done.stdout == "True\n", done.stderr


def test_bench__without_torch_measures_onnx_runtime_alone(exported: tuple[Path, Path]) -> None:
    arguments = ["bench", str(exported[1]), "batches=1,2", "seconds=0.05", "--json"]
    done = run_without(_COMMAND.format(arguments=arguments))
    assert done.returncode == 0, done.stderr
    assert "tldist[train]" in done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["batch"], row["variant"]) for row in rows] == [(1, "onnxruntime"), (2, "onnxruntime")]
    assert all(row["ratio"] is None and row["images_per_second"] > 0 for row in rows)
