"""Greedy soup, the curve over alpha and the search: what they choose, say and survive."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support import make_images, run_tldist
from tests.support_models import SMALL, lively_model
from tests.support_processes import run_ranks
from tldist import api
from tldist.bundle import BundleConfig, read_bundle
from tldist.errors import RecipeError
from tldist.models.load import load_bundle, save_bundle
from tldist.models.zoo import describe_network

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for seed, split in enumerate(("train", "val", "test")):
        make_images(root / split, dict.fromkeys(NAMES, 8), seed=seed)
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[str, Path]:
    """A base, probes of it on the data that are good, and one whose head is noise."""
    root = tmp_path_factory.mktemp("models")
    base = lively_model("mobilenet_v3_small", 3)
    config = BundleConfig(describe_network("mobilenet_v3_small", 3), NAMES, SMALL)
    save_bundle(root / "base", base, config)
    paths = {"base": root / "base"}
    for seed in range(2):
        run = root / f"good{seed}"
        api.finetune(
            data=data,
            model=root / "base",
            out=run,
            epochs=6,
            train="head",
            batch_size=8,
            seed=seed,
            optimizer={"lr": 0.02},
            workers=0,
        )
        paths[f"good{seed}"] = run
    bad, _ = load_bundle(root / "base")
    nn.init.normal_(bad.classifier[3].weight, std=3.0)
    save_bundle(root / "bad", bad, config)
    return {**paths, "bad": root / "bad"}


def summary_of(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "summary.json").read_text())
    return found


def accuracy(model: Path, data: Path, split: str = "val") -> float:
    value = api.evaluate(model=model, data={"path": str(data), "split": split}, workers=0).values["accuracy"]
    return float(value)


def test_greedy_soup__takes_what_does_not_lower_validation(
    tmp_path: Path, models: dict[str, Path], data: Path
) -> None:
    given = [models["bad"], models["good0"], models["good1"]]
    api.fuse(bundles=given, method="greedy_soup", data=data, out=tmp_path / "run", workers=0)
    rows = summary_of(tmp_path / "run")["soup"]
    assert isinstance(rows, list)
    alone = {str(model): accuracy(model, data) for model in given}
    assert alone[rows[0]["model"]] == max(alone.values()) == rows[0]["accuracy"]
    best = rows[0]["accuracy"]
    for row in rows[1:]:
        assert row["taken"] == (row["accuracy"] >= best)
        best = max(best, row["accuracy"]) if row["taken"] else best
    assert accuracy(tmp_path / "run", data) == best
    taken = [row["model"] for row in rows if row["taken"]]
    parents = [load_file(read_bundle(Path(label))[0] / "model.safetensors") for label in taken]
    for name, tensor in load_file(tmp_path / "run" / "bundle" / "model.safetensors").items():
        expected = torch.stack([parent[name].double() for parent in parents]).mean(0)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    lineage = read_bundle(tmp_path / "run")[1].lineage["parents"]
    assert {row["path"]: bool(row["share"]) for row in lineage} == {
        str(read_bundle(Path(row["model"]))[0]): row["taken"] for row in rows
    }


def test_greedy_soup__of_one_is_the_best_parent(tmp_path: Path, models: dict[str, Path], data: Path) -> None:
    """A noisy head at a hundredfold scale spoils every average."""
    model, config = load_bundle(models["bad"])
    model.classifier[3].weight.data *= 100
    save_bundle(tmp_path / "worse", model, config)
    given = [tmp_path / "worse", models["good0"]]
    api.fuse(bundles=given, method="greedy_soup", data=data, out=tmp_path / "run", workers=0)
    kept, other = (load_file(read_bundle(p)[0] / "model.safetensors") for p in (tmp_path / "run", given[1]))
    assert all(torch.equal(kept[name], tensor) for name, tensor in other.items())
    assert summary_of(tmp_path / "run")["kept"] == str(models["good0"])


def test_curve__the_best_alpha_on_validation_is_kept(
    tmp_path: Path, models: dict[str, Path], data: Path
) -> None:
    api.fuse(
        bundles=[models["good0"]],
        base=models["bad"],
        method="wise_ft",
        curve=(1.0, 0.0, 0.5),
        data=data,
        out=tmp_path / "run",
        workers=0,
    )
    summary = summary_of(tmp_path / "run")
    rows = summary["curve"]
    assert isinstance(rows, list)
    assert [row["alpha"] for row in rows] == [0.0, 0.5, 1.0]
    assert rows[0]["accuracy"] == accuracy(models["bad"], data)
    assert rows[2]["accuracy"] == accuracy(models["good0"], data)
    best = max(rows, key=lambda row: (row["accuracy"], -row["loss"]))
    assert summary["alpha"] == best["alpha"]
    assert accuracy(tmp_path / "run", data) == best["accuracy"]
    after = summary["after"]
    assert isinstance(after, dict)
    assert after["accuracy"] == accuracy(tmp_path / "run", data, "test")  # chosen on val, measured on test


def test_search__ranks_all_and_keeps_the_best(tmp_path: Path, models: dict[str, Path], data: Path) -> None:
    source = make_images(tmp_path / "source", {"b": 5, "a": 5}, seed=9)
    outcome = run_tldist(
        "fuse",
        models["good0"],
        models["good1"],
        "method=search",
        f"base={models['base']}",
        f"data={data}",
        f"sources={data},{source}",
        "search.points=2",
        "search.keep=2",
        f"out={tmp_path / 'run'}",
        "workers=0",
    )
    assert outcome.returncode == 0, outcome.stderr
    search = summary_of(tmp_path / "run")["search"]
    assert isinstance(search, dict)
    table = search["table"]
    names = {row["name"].split()[0] for row in table}
    assert {"average", "wise_ft", "slerp", "task_arithmetic", "ties", "dare_ties", "model_stock"} <= names
    keys = [(row["score"], -row["loss"]) for row in table]
    assert keys == sorted(keys, reverse=True)
    parents = {row["name"]: row for row in table if row["kind"] == "parent"}
    assert parents.keys() == {str(models["good0"]), str(models["good1"])}
    for path, row in parents.items():
        assert row["accuracy"] == accuracy(Path(path), data)
        there = api.evaluate(model=Path(path), data=source, workers=0).values["accuracy"]
        assert row["sources"] == {data.name: accuracy(Path(path), data, "test"), "source": there}
    kept = next(row for row in table if row["name"] == search["kept"])
    assert (
        accuracy(tmp_path / "run", data) == kept["accuracy"] >= max(r["accuracy"] for r in parents.values())
    )
    assert (tmp_path / "run" / "search.svg").read_text().startswith("<svg xmlns=")
    assert "task_arithmetic scale=0.1" in outcome.stdout
    lineage = read_bundle(tmp_path / "run")[1].lineage["notes"]["search"]
    assert lineage == search
    _check_that_it_can_be_made_again(lineage, models, data, tmp_path)


def _check_that_it_can_be_made_again(
    lineage: dict[str, Any], models: dict[str, Path], data: Path, out: Path
) -> None:
    """By what the lineage says of the winner, as a plain merge."""
    names = ("alpha", "scale", "density", "gamma")
    given = {name: lineage[name] for name in names if name in lineage}
    api.fuse(
        bundles=[models[f"good{number}"] for number in lineage["members"]],
        base=models["base"],
        method="average" if lineage["method"] == "greedy_soup" else lineage["method"],
        weights=tuple(lineage["weights"]),
        data=data,
        out=out / "again",
        workers=0,
        **given,
    )
    first, again = (load_file(out / run / "bundle" / "model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())


def test_search__keeps_a_parent_that_no_merge_reaches(
    tmp_path: Path, models: dict[str, Path], data: Path
) -> None:
    model, config = load_bundle(models["bad"])
    model.classifier[3].weight.data *= 100
    save_bundle(tmp_path / "worse", model, config)
    api.fuse(
        bundles=[tmp_path / "worse", models["good0"]],
        method="search",
        data=data,
        search={"points": 2, "methods": ("average", "multi_slerp")},
        out=tmp_path / "run",
        workers=0,
    )
    summary = summary_of(tmp_path / "run")
    assert summary["kept"] == str(models["good0"])
    assert accuracy(tmp_path / "run", data) == accuracy(models["good0"], data)


def test_search__goes_on_where_it_was_stopped(
    tmp_path: Path, models: dict[str, Path], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(out: Path) -> None:
        api.fuse(
            bundles=[models["good0"], models["good1"]],
            method="search",
            data=data,
            search={"points": 2, "methods": ("average", "slerp", "multi_slerp")},
            out=out,
            workers=0,
        )

    start(tmp_path / "undisturbed")
    built = []
    from tldist.fuse import trials

    original = trials.build

    def counted(*args: object, **options: object) -> object:
        built.append(args)
        if len(built) == 4:
            raise KeyboardInterrupt
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(trials, "build", counted)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "run")
    assert summary_of(tmp_path / "run")["status"] == "interrupted"
    first = len(built) - 1
    start(tmp_path / "run")
    lines = (tmp_path / "run" / "trials.jsonl").read_text().splitlines()
    assert len(lines) == len({json.loads(line)["trial"] for line in lines}) == len(built) - 1
    assert first == 3
    assert summary_of(tmp_path / "run")["search"] == summary_of(tmp_path / "undisturbed")["search"]


def _search(given: list[Path], data: Path, out: Path) -> str:
    api.fuse(
        bundles=given,
        method="search",
        data=data,
        search={"points": 2, "methods": ("average", "slerp")},
        out=out,
        workers=0,
    )
    return json.dumps(summary_of(out)["search"], sort_keys=True)


def test_search__two_processes_choose_as_one(tmp_path: Path, models: dict[str, Path], data: Path) -> None:
    given = [models["good0"], models["bad"]]
    (one,) = run_ranks(_search, 1, given, data, tmp_path / "one")
    two = run_ranks(_search, 2, given, data, tmp_path / "two")
    assert two[0] == two[1]
    first, second = json.loads(one), json.loads(two[0])
    assert first["kept"] == second["kept"]
    losses = [[row["loss"] for row in found["table"]] for found in (first, second)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


# -- refusals ----------------------------------------------------------------------------------------------


def test_selection__needs_labels(tmp_path: Path, models: dict[str, Path], data: Path) -> None:
    with pytest.raises(RecipeError, match="chooses on labelled data="):
        api.fuse(bundles=[models["good0"]], method="greedy_soup", out=tmp_path / "run")
    with pytest.raises(RecipeError, match=r"search\.methods=fishr: unknown"):
        api.fuse(
            bundles=[models["good0"]],
            method="search",
            data=data,
            search={"methods": ("fishr",)},
            out=tmp_path / "run2",
        )
