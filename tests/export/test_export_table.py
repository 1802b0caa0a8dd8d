"""The table of all torchvision classifiers: a sample of it, and the page that it makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support import REPOSITORY


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    import export_table

    module: ModuleType = export_table
    return module


@pytest.mark.parametrize(("name", "size"), [("squeezenet1_1", 64), ("resnet18", 64), ("alexnet", 96)])
def test_table__a_sample_is_exported_and_right(table: ModuleType, name: str, size: int) -> None:
    row = table.measure(name, False, size)
    assert row["right"]
    assert (row["exporter"], row["refused"], row["files"]) == ("dynamo", [], 1)
    assert 0 < row["own"] < 1e-4  # PyTorch's outputs are no zeros, and its errors are small
    assert row["error"] < 1e-4
    assert row["bytes"] > 4 * row["parameters"] * 0.99


def test_table__what_cannot_be_is_a_row_with_its_reason(table: ModuleType) -> None:
    row = table.measure("vit_b_32", True, 224)
    assert "Wrong image height! Expected 224 but got 256!" in row["reason"]
    assert "exporter" not in row


def row_of(name: str, **values: Any) -> dict[str, Any]:
    figures = {
        "pixels": 224, "parameters": 12_300_000, "seconds": 3.21, "exporter": "dynamo", "refused": [],
        "opset": 20, "nodes": 49, "files": 1, "bytes": 45_600_000, "error": 2e-6, "own": 1e-6, "right": True,
    }  # fmt: skip
    return {"model": name, "free": False, **figures, **values}


def test_table__goes_on_after_the_rows_that_are_there(
    table: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of the pattern are there: nothing runs, the page is written."""
    rows = [
        row_of("resnet34", files=2),
        row_of("resnet18", exporter="torchscript", refused=[["dynamo", "wrong by 1"]]),
        row_of("resnet18", free=True),
        {"model": "resnet101", "free": False, "not_run": "did not end within 60 minutes on this machine"},
        {"model": "resnet152", "free": False, "reason": "ResNet cannot", "seconds": 1.0},
        row_of("resnet50", right=False),
    ]
    (tmp_path / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "page.md"
    options = ["--pattern", "resnet*", "--rows", str(tmp_path / "rows"), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["export_table.py", *options])
    with pytest.raises(SystemExit, match="NO in the table"):
        table.main()
    page = out.read_text(encoding="utf-8")
    assert "3 of 80 exported, 75 not tried yet" in page
    line = "| resnet18 | 12.3 M | 224 | torchscript (dynamo refused: wrong by 1) | 20 | 49 | 45.6 |"
    assert line in page
    assert "| 45.6 in 2 files | 2.0e-06 | 2.0 | yes | 3.2 |" in page
    assert page.index("| resnet18 ") < page.index("| resnet34 ") < page.index("## What cannot")
    assert "- `resnet101`: not run: did not end within 60 minutes" in page
    assert "- `resnet152`: ResNet cannot" in page
    assert page.index("## Height and width free") > page.index("resnet152")
    assert len((tmp_path / "rows").read_text().splitlines()) == len(rows)


def test_table__no_head_is_zero_and_batchnorm_knows_its_pictures(table: ModuleType) -> None:
    assert table.find_head(table.lively("vit_b_32", 224))[1].weight.any()
    model = table.lively("resnet18", 64)
    assert not model.training
    assert model.bn1.num_batches_tracked == 1
    assert not model.bn1.running_mean.eq(0).any()
