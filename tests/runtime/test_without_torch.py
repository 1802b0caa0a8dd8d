"""What serves runs where torch cannot be imported."""

from __future__ import annotations

import subprocess
from pathlib import Path

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
