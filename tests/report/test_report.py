"""The page as a person and a browser get it: right values, nothing foreign, nothing loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import PCA

from tests.embed.tiny import tiny_package
from tests.report.folders import write_finetune, write_fusion, write_package_folder
from tests.support import REPOSITORY, make_images, run_tldist
from tldist import api
from tldist.errors import RecipeError, TldistError
from tldist.files import write_json
from tldist.report.vectors import principal_plane, sample_vectors

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "</svg></table><iframe src='http://evil.example'>",
    "{{ 7 * 7 }} {% for x in y %}",
    r"$\frac{1}{$ & <b>",
    "line\nbreak\x01\x7f",
    "日本語 é",
]


class Page(HTMLParser):
    """What a browser makes of a page: tags with attributes, cells of tables, all text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.cells: list[str] = []
        self._style = self._cell = False
        self.feed(html)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"
        if tag in ("td", "th", "dd", "dt"):
            self._cell = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._style = False
        self._cell = self._cell and tag not in ("td", "th", "dd", "dt")

    def handle_data(self, data: str) -> None:
        if not self._style:
            self.texts.append(data)
        if self._cell:
            self.cells[-1] += data


def report(*paths: Path, out: Path) -> Page:
    """The page of some folders."""
    api.report(runs=paths, out=out)
    return Page(out.read_text(encoding="utf-8"))


def assert_harmless(html: str) -> None:
    """No script, no handler, nothing that a browser would fetch."""
    page = Page(html)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link", "form", "base", "foreignobject"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
    styles = [value for _, attributes in page.tags if (value := attributes.get("style"))]
    assert not [style for style in styles if re.search(r"url\((?!#)", style)]
    head = html[: html.index("</style>")]
    assert "url(" not in head
    assert "@import" not in head
    assert re.findall(r"https?://(?!evil\.example)", html) == []


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real folder of 40 vectors in units of 8."""
    folder = tmp_path_factory.mktemp("vectors")
    weights = np.random.default_rng(0).normal(size=(3, 6)).astype(np.float32)
    package = tiny_package(folder / "package", weights)
    images = make_images(folder / "images", {"<b>a</b>": 15, "b": 25})
    api.embed(model=package, data=images, out=folder / "out", unit_rows=8)
    return folder / "out"


def test_report__values_are_those_of_the_files(tmp_path: Path, vectors: Path) -> None:
    classes = ["1", "2", "10"]
    tuned = write_finetune(tmp_path / "tuned", classes)
    fused = write_fusion(tmp_path / "fused", ["runs/a/bundle", "runs/b/bundle"], classes)
    parity = write_package_folder(tmp_path / "package", classes)
    page = report(
        tmp_path / "tuned", tmp_path / "fused", tmp_path / "package", vectors, out=tmp_path / "r.html"
    )
    for values in (tuned["validation"], fused["after"], *fused["before"].values()):
        assert f"{values['accuracy']:.4f}" in page.cells
        assert f"{values['loss']:.4f}" in page.cells
        assert f"{values['count']:,}" in page.cells
    assert {"before: runs/a/bundle", "before: runs/b/bundle", "after", "validation"} <= set(page.cells)
    for values in (tuned["validation"], fused["after"]):
        start = page.cells.index(str(values["confusion"][0][0]), page.cells.index(f"{values['loss']:.4f}"))
        shown = [page.cells[start + 4 * row : start + 4 * row + 3] for row in range(3)]
        assert shown == [[str(count) for count in row] for row in values["confusion"]]
    figures = parity["outputs"][0]
    for name in ("max_absolute", "mean_absolute", "max_relative", "tolerance"):
        assert f"{figures[name]:.2e}" in page.cells
    assert f"{figures['cosine']:.7f}" in page.cells
    assert "40" in page.cells  # vectors
    assert "parity PASS" in page.text
    assert "SHA-256 of the 60 frozen tensors is the same" in page.text
    assert page.text.count("40 vectors, coloured by their 2 labels") == 1
    assert sum(tag == "svg" for tag, _ in page.tags) == 3 + 1 + 1


def test_report__hostile_names_stay_text(tmp_path: Path) -> None:
    """In class names, paths, recipes, reports of parity and labels, as table, picture and title."""
    write_finetune(tmp_path / "<script>run<" / "x", HOSTILE)
    (tmp_path / "<script>run<" / "x").rename(tmp_path / "<img src=q onerror=alert(3)>")
    write_fusion(tmp_path / "fused", HOSTILE[:3], HOSTILE)
    write_package_folder(tmp_path / "package", HOSTILE, "FAIL")
    rows = [{"method": name, "mean": 0.1 * k, "std": 0.01, "draws": [name]} for k, name in enumerate(HOSTILE)]
    (tmp_path / "table").mkdir()
    write_json(tmp_path / "table" / "table.json", rows)
    _write_vectors(tmp_path / "vectors", np.random.default_rng(0).normal(size=(70, 4)), HOSTILE * 10)
    names = ("<img src=q onerror=alert(3)>", "fused", "package", "table", "vectors")
    page = report(*(tmp_path / name for name in names), out=tmp_path / "r.html")
    assert_harmless((tmp_path / "r.html").read_text(encoding="utf-8"))
    for name in HOSTILE:
        shown = name.replace("\x01", "").replace("\x7f", "")
        assert any(shown in cell.replace("\x01", "").replace("\x7f", "") for cell in page.cells), name
    assert "path: <photos> & more" in page.text
    assert "<img src=q onerror=alert(3)>" in page.text
    assert "49" not in page.cells


def test_report__loads_nothing(tmp_path: Path, vectors: Path) -> None:
    write_finetune(tmp_path / "tuned", ["a", "b"])
    write_package_folder(tmp_path / "package", ["a", "b"])
    out = tmp_path / "r.html"
    report(tmp_path / "tuned", tmp_path / "package", vectors, out=out)
    html = out.read_text(encoding="utf-8")
    assert_harmless(html)
    assert "://" not in html


def test_report__links_lead_to_sections(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_finetune(tmp_path / name, ["x", "y"])
    page = report(*(tmp_path / name for name in "abc"), out=tmp_path / "r.html")
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert links == [f"#{name}" for name in sections]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    pictures = [name for name in ids if name not in sections]
    assert len(set(sections)) == 3
    assert all(
        re.fullmatch(r"(m|p|image)[0-9a-f]+", str(name)) for name in pictures
    )  # named by their content


def test_report__unfinished_run(tmp_path: Path) -> None:
    """No summary yet, NaN and half a line in the metrics, keys that are missing."""
    write_finetune(tmp_path / "run", ["a"])
    (tmp_path / "run" / "summary.json").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 13, "loss": NaN}\n{"epoch": 3, "loss": 0.5}\n{"step": "x", "loss": 1}\n{"step": 14, "lo'
        )
    page = report(tmp_path / "run", out=tmp_path / "r.html")
    assert "unfinished" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 3


def test_report__failed_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    values = {"stage": "finetune", "status": "failed", "reason": "DomainError: <a> is empty"}
    write_json(tmp_path / "run" / "summary.json", values)
    page = report(tmp_path / "run", out=tmp_path / "r.html")
    assert "DomainError: <a> is empty" in page.text


def test_report__frozen_tensors_that_changed(tmp_path: Path) -> None:
    summary = write_finetune(tmp_path / "run", ["a", "b"])
    summary["frozen"]["after"] = "cd" * 32
    write_json(tmp_path / "run" / "summary.json", summary)
    assert "frozen tensors DIFFERS" in report(tmp_path / "run", out=tmp_path / "r.html").text


def test_report__large_runs_make_a_small_page(tmp_path: Path) -> None:
    """1,000 classes, 20,000 steps, 6,000 vectors: below 2 MB, the worst confusions by name."""
    classes = [f"class {number}" for number in range(1000)]
    summary = write_finetune(tmp_path / "run", classes, steps=20_000)
    summary["validation"]["confusion"][17][905] = 7777
    write_json(tmp_path / "run" / "summary.json", summary)
    random = np.random.default_rng(0)
    _write_vectors(tmp_path / "vectors", random.normal(size=(6000, 64)), [f"{k % 300}" for k in range(6000)])
    out = tmp_path / "r.html"
    page = report(tmp_path / "run", tmp_path / "vectors", out=out)
    assert out.stat().st_size < 1_000_000
    place = page.cells.index("7,777")
    assert page.cells[place - 2 : place] == ["class 17", "class 905"]
    assert "2,000 vectors, coloured by their 300 labels" in page.text
    assert "290 others" in page.text


# -- mistakes --------------------------------------------------------------------------------------------


def test_report__what_is_nothing_to_report_on(tmp_path: Path) -> None:
    """The error names what was expected; the older page stays."""
    out = tmp_path / "r.html"
    out.write_text("old")
    write_finetune(tmp_path / "good", ["a"])
    (tmp_path / "empty").mkdir()
    result = run_tldist("report", tmp_path / "good", tmp_path / "empty", f"out={out}")
    assert result.returncode == 2
    assert f"{tmp_path / 'empty'}: nothing to report on" in result.stderr
    assert "summary.json" in result.stderr
    assert "Traceback" not in result.stderr
    assert out.read_text() == "old"
    with pytest.raises(RecipeError, match="no such folder"):
        api.report(runs=[tmp_path / "absent"], out=out)
    with pytest.raises(RecipeError, match="is a folder"):
        api.report(runs=[tmp_path / "good"], out=tmp_path / "empty")
    with pytest.raises(RecipeError, match="runs"):
        api.report(runs=[], out=out)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("summary.json", "[1, 2]"),
        ("summary.json", "{"),
        ("table.json", '{"method": "a"}'),
        ("table.json", '[{"method": "a", "mean": "high"}]'),
        ("manifest.json", "[]"),
        ("package.json", "{}"),
    ],
)
def test_report__damaged_files_are_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(TldistError, match=re.escape(name)):
        api.report(runs=[tmp_path / "run"], out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# -- the map of vectors ----------------------------------------------------------------------------------


def _write_vectors(folder: Path, vectors: np.ndarray, labels: list[str], unit_rows: int = 1000) -> None:
    """A folder of vectors by hand: id, embedding, label."""
    (folder / "units").mkdir(parents=True)
    units = -(-len(vectors) // unit_rows)
    write_json(folder / "manifest.json", {"rows": len(vectors), "units": units})
    write_json(folder / "summary.json", {"stage": "embed", "status": "done", "rows": len(vectors)})
    for unit in range(units):
        rows = slice(unit * unit_rows, (unit + 1) * unit_rows)
        flat = pa.array(vectors[rows].astype(np.float32).reshape(-1))
        columns = {
            "id": [f"{k}" for k in range(len(vectors))][rows],
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
            "label": labels[rows],
        }
        pq.write_table(pa.table(columns), folder / f"part-{unit:05d}.parquet")
        write_json(folder / "units" / f"{unit:05d}.json", {})


@pytest.mark.parametrize("shape", [(50, 7), (30, 200), (5, 2)])
def test_principal_plane__equals_scikit_learn(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(shape)
    vectors = random.normal(size=shape) @ random.normal(size=(shape[1], shape[1])) + 5
    points, share = principal_plane(vectors)
    reference = PCA(2, svd_solver="full").fit(vectors)
    expected = reference.transform(vectors)
    for axis in (0, 1):
        sign = np.sign(expected[np.abs(expected[:, axis]).argmax(), axis])
        np.testing.assert_allclose(points[:, axis], sign * expected[:, axis], atol=1e-8)
    assert share == pytest.approx(reference.explained_variance_ratio_.sum())


def test_sample_vectors__spreads_evenly_and_keeps_labels_with_vectors(tmp_path: Path) -> None:
    """Vector k holds the number k, its label too."""
    vectors = np.repeat(np.arange(950.0)[:, None], 3, axis=1)
    _write_vectors(tmp_path / "v", vectors, [str(k) for k in range(950)], unit_rows=100)
    parts = sorted((tmp_path / "v").glob("*.parquet"))
    found, labels = sample_vectors(parts, 200)
    assert labels == [str(int(row[0])) for row in found]
    assert (len(found), found[0, 0], found[-1, 0]) == (200, 0, 949)
    assert np.diff(found[:, 0]).min() >= 4
    assert len(sample_vectors(parts, 5000)[0]) == 950


def test_report__uncommitted_parts_are_left_out(tmp_path: Path) -> None:
    _write_vectors(tmp_path / "v", np.random.default_rng(0).normal(size=(40, 3)), ["a"] * 40, unit_rows=10)
    (tmp_path / "v" / "units" / "00002.json").unlink()
    (tmp_path / "v" / "summary.json").unlink()
    page = report(tmp_path / "v", out=tmp_path / "r.html")
    assert "3 of 4 units are done" in page.text
    assert "30 vectors" in page.text


def test_report__needs_no_torch(tmp_path: Path, vectors: Path) -> None:
    write_finetune(tmp_path / "run", ["a", "b"])
    code = (
        "import sys; sys.modules['torch'] = None\nfrom tldist.cli import main\nsys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "report", tmp_path / "run", vectors, f"out={tmp_path / 'r.html'}"]
    result = subprocess.run([*command, "--json"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    verdict = json.loads(result.stdout.splitlines()[-1])
    assert (verdict["sections"], verdict["bytes"]) == (2, (tmp_path / "r.html").stat().st_size)
