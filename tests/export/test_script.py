"""The stand-alone script: what ``tldist evaluate`` does, where neither tldist nor torch can be imported."""

from __future__ import annotations

import ast
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import REPOSITORY, run_tldist
from tests.support_export import CLASSES
from tldist.runtime.package import Package
from tldist.runtime.predict import predict
from tldist.runtime.preprocess import prepare

SCRIPT = REPOSITORY / "export" / "run_package.py"


def run_script(model: Path, folder: Path, cwd: Path) -> tuple[dict[str, str], str]:
    """The label of each file, and the last line."""
    code = (
        "import runpy, sys\n"
        "for name in ('tldist', 'torch', 'torchvision', 'onnx', 'safetensors', 'pydantic'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(SCRIPT), str(model), str(folder)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    return dict(line.split("\t") for line in lines), last


def picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coarse colours, and finer noise upon them."""
    coarse = Image.fromarray(random.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int64)
    return Image.fromarray(np.clip(smooth + random.integers(-30, 30, smooth.shape), 0, 255).astype(np.uint8))


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """One of the kinds of image that are found in the wild."""
    if mode == "I;16":
        grey = np.asarray(image.convert("L")).astype(np.uint16)
        return Image.fromarray(grey * 256 + 200)
    if mode == "RGBA":
        alpha = Image.fromarray(np.tile(np.arange(image.width, dtype=np.uint8), (image.height, 1)))
        image.putalpha(alpha)
        return image
    return image.quantize(17) if mode == "P" else image.convert(mode)


KINDS = [("png", "RGB"), ("png", "L"), ("png", "P"), ("png", "RGBA"), ("png", "I;16"), ("tiff", "F"),
         ("jpg", "RGB"), ("jpg", "L"), ("jpg", "CMYK"), ("png", "1")]  # fmt: skip


@pytest.fixture(scope="module")
def hundred(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 images of four classes, of every kind and size, some turned."""
    folder = tmp_path_factory.mktemp("script")
    random = np.random.default_rng(0)
    for number in range(100):
        suffix, mode = KINDS[number % len(KINDS)]
        low, high = (200, 700) if suffix == "jpg" else (20, 120)
        width, height = (int(side) for side in random.integers(low, high, 2))
        image = as_mode(picture(random, width, height), mode)
        exif = Image.Exif()
        exif[0x0112] = int(random.integers(1, 9))
        target = folder / CLASSES[number % 4]
        target.mkdir(exist_ok=True)
        image.save(target / f"{number}.{suffix}", exif=exif)
    return folder


def test_script__is_as_short_as_it_says() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    body = SCRIPT.read_text(encoding="utf-8").split('"""')[2]
    assert len([line for line in body.splitlines() if line.strip()]) <= 20
    modules = {
        name.name.split(".")[0] if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in node.names
    }
    assert modules - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "PIL"}


def test_script__agrees_with_evaluate_on_100_images(
    exported: tuple[Path, Path], hundred: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model.onnx"  # the graph alone, without the package around it
    shutil.copy(exported[1] / "model.onnx", model)
    labels, last = run_script(model, hundred, tmp_path)
    assert len(labels) == 100
    files = list(labels)
    expected = predict(Package.open(exported[1], threads=1), files)
    assert [labels[file] for file in files] == [found.label for found in expected]
    done = run_tldist("evaluate", exported[1], f"data={hundred}", "workers=0", "--json")
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout.splitlines()[-1])
    assert last == f"accuracy {verdict['accuracy']:.4f} on 100 images"
    assert 0 < verdict["accuracy"] < 1, "an accuracy of 0 or 1 compares little"


def test_script__prepares_the_same_pixels(exported: tuple[Path, Path], hundred: Path) -> None:
    """Labels of a random model may agree by chance; pixels may not."""
    source = SCRIPT.read_text(encoding="utf-8").split("files = sorted")[0]
    names: dict[str, object] = {}
    argv, sys.argv = sys.argv, [str(SCRIPT), str(exported[1] / "model.onnx")]
    try:
        exec(compile(source, str(SCRIPT), "exec"), names)
    finally:
        sys.argv = argv
    how = Package.open(exported[1], threads=1).config.preprocessing
    for file in sorted(hundred.glob("*/*")):
        data = file.read_bytes()
        found = names["prepare"](Image.open(io.BytesIO(data)))  # type: ignore[operator]
        np.testing.assert_array_equal(found, prepare(data, how), err_msg=str(file))


@pytest.mark.realdata
def test_script__on_photos(exported: tuple[Path, Path], real_data: Path, tmp_path: Path) -> None:
    labels, _ = run_script(exported[1] / "model.onnx", real_data / "photos" / "val", tmp_path)
    files = list(labels)
    expected = predict(Package.open(exported[1], threads=1), files)
    assert [labels[file] for file in files] == [found.label for found in expected]
