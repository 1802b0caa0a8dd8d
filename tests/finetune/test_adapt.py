"""Adaptation from the outside: what it learns, that target labels stay sealed, what is promoted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.domain.test_seal import shuffled
from tests.support import make_images
from tldist import api
from tldist.adaptation.methods import METHODS, Pair
from tldist.domain import open_domain
from tldist.errors import DomainError, ModelError, RecipeError
from tldist.finetune.adapt import candidate_steps
from tldist.models.load import load_bundle

SMALL: dict[str, Any] = {
    "model": "tests.nets:plain_cnn",
    "weights": "none",
    "image_size": 32,
    "precision": "fp32",
    "batch_size": 16,
    "workers": 0,
    "epochs": 2,
    "optimizer": {"lr": 3e-3},
    "augment": {"crop": None, "flip": False},
    "cache": "off",
    "track": None,
    "guard": {"duplicates": "off"},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "d"
    make_images(folder / "train", {"a": 20, "b": 22, "c": 18})
    make_images(folder / "val", {"a": 5, "b": 6, "c": 7}, seed=1)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target") / "d"
    make_images(folder / "train", {"a": 14, "b": 12, "c": 10}, size=(30, 50), seed=2)
    make_images(folder / "test", {"a": 4, "b": 5, "c": 6}, size=(30, 50), seed=3)
    return folder


def adapt(source: Path | None, target: Path, out: Path, method: str, **more: Any) -> dict[str, Any]:
    settings = {"method": method, "target": {"path": str(target)}, "hidden": 8, **more.pop("adapt", {})}
    data = {} if source is None else {"data": str(source)}
    api.finetune(out=out, adapt=settings, **{**SMALL, **data, **more})
    return summary(out)


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return found


def weights(out: Path) -> dict[str, Tensor]:
    return load_file(out / "bundle" / "model.safetensors")


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(first[name].numpy().tobytes() == second[name].numpy().tobytes() for name in first)


def report(out: Path) -> str:
    api.report(runs=[out], out=out / "report.html")
    return (out / "report.html").read_text()


def choice(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "choice.json").read_text())
    return found


# -- sealed labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["mcc", "dann", "shot"])
def test_sealed__permuted_labels_change_no_bit_of_weights_and_choice(
    source: Path, target: Path, tmp_path: Path, method: str
) -> None:
    poisoned = tmp_path / "poisoned"
    shuffled(target / "train", poisoned / "train")
    shuffled(target / "test", poisoned / "test")
    labels = [open_domain(path).labels.tolist() for path in (target, poisoned)]
    assert labels[0] != labels[1]
    limit = {"path": str(poisoned), "limit": 33}
    first = adapt(source, target, tmp_path / "one", method, adapt={"target": {**limit, "path": str(target)}})
    second = adapt(source, target, tmp_path / "two", method, adapt={"target": limit})
    steps = sorted(path.name for path in (tmp_path / "one" / "checkpoints").iterdir())
    assert steps == sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir())
    for step in steps:
        assert same(
            *(
                load_file(tmp_path / out / "checkpoints" / step / "model.safetensors")
                for out in ("one", "two")
            )
        )
    assert same(weights(tmp_path / "one"), weights(tmp_path / "two"))
    assert choice(tmp_path / "one") == choice(tmp_path / "two")
    assert first["target_test"]["confusion"] != second["target_test"]["confusion"], (
        "only the last look differs"
    )


def test_sealed__labels_are_opened_once_after_the_choice_and_that_is_said(
    source: Path, target: Path, tmp_path: Path
) -> None:
    found = adapt(source, target, tmp_path / "r", "mcc")
    record = found["adaptation"]["unsealed"]
    assert record["times"] == 1
    assert record["images"] == 15
    opened = (tmp_path / "r" / "unsealed.json").stat().st_mtime_ns
    assert (tmp_path / "r" / "choice.json").stat().st_mtime_ns <= opened
    assert "test" not in json.dumps(choice(tmp_path / "r"))
    rows = {row["name"]: row["test"] for row in found["adaptation"]["candidates"]}
    chosen = found["adaptation"]["chosen"]
    assert rows[chosen] == found["target_test"]["accuracy"]
    assert found["adaptation"]["regret"] == pytest.approx(max(rows.values()) - rows[chosen])
    measured = api.evaluate(model=tmp_path / "r", data=str(target), trust_code=True, workers=0).values
    assert measured["accuracy"] == pytest.approx(rows[chosen])


def test_sealed__a_target_without_labels_is_no_hindrance(source: Path, target: Path, tmp_path: Path) -> None:
    loose = tmp_path / "loose"
    loose.mkdir()
    for number, file in enumerate(sorted((target / "train").rglob("*.png"))):
        (loose / f"{number}.png").write_bytes(file.read_bytes())
    found = adapt(source, loose, tmp_path / "r", "mcc")
    assert found["target_test"] is None
    assert found["adaptation"]["not_measured"] == "it has no labels"
    assert not (tmp_path / "r" / "unsealed.json").exists()


def test_use__labels_choose_and_it_is_said(
    source: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = adapt(
        source, target, tmp_path / "r", "mcc", adapt={"target": {"path": str(target), "labels": "use"}}
    )
    assert "USED to choose" in capsys.readouterr().out
    assert found["adaptation"]["labels"] == "use"
    rows = found["adaptation"]["candidates"]
    best = max(row["scores"]["target_accuracy"] for row in rows)
    chosen = next(row for row in rows if row["name"] == found["adaptation"]["chosen"])
    assert chosen["scores"]["target_accuracy"] == best
    plain = api.evaluate(
        model=tmp_path / "r" / "source_only", data={"path": str(target), "split": "train"}, trust_code=True,
        workers=0,
    ).values  # fmt: skip
    scores = {row["name"]: row["scores"]["target_accuracy"] for row in rows}
    assert scores["source_only"] == pytest.approx(plain["accuracy"])
    page = report(tmp_path / "r")
    assert "labels of the target were USED to choose" in page
    assert "times opened: 1" in page


def test_use__without_labels_is_refused(source: Path, target: Path, tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    for number, file in enumerate(sorted((target / "train").rglob("*.png"))):
        (tmp_path / "loose" / f"{number}.png").write_bytes(file.read_bytes())
    with pytest.raises(DomainError, match="cannot choose: it has no labels"):
        adapt(
            source, target, tmp_path / "r", "mcc",
            adapt={"target": {"path": str(tmp_path / "loose"), "labels": "use"}},
        )  # fmt: skip


# -- what is chosen and promoted -------------------------------------------------------------------------


def collapse(pair: Pair) -> Tensor:
    """A loss that wants one answer for all of the target."""
    return -pair.target.logits.log_softmax(1)[:, 0].mean() * 30


def test_collapsed__source_only_is_the_bundle_and_it_is_said(
    source: Path, target: Path, tmp_path: Path
) -> None:
    settings = {"method": "tests.finetune.test_adapt:collapse", "target": {"path": str(target)}}
    found = api.finetune(out=tmp_path / "r", adapt=settings, **{**SMALL, "data": str(source), "epochs": 3})
    assert "NOT PROMOTED" in found.text
    assert "collapsed" in found.text
    told = summary(tmp_path / "r")["adaptation"]
    assert told["promoted"] is False
    rows = {row["name"]: row for row in told["candidates"]}
    assert rows["epoch-3"]["answers"]["effective_classes"] == pytest.approx(1, abs=0.1)
    assert "collapsed" in rows["epoch-3"]["reason"]
    assert rows["epoch-3"]["mean_rank"] is None, "it is not even ranked"
    assert same(weights(tmp_path / "r"), weights(tmp_path / "r" / "source_only"))
    assert found.values["promoted"] is False
    page = report(tmp_path / "r")
    assert "not promoted: the bundle is source_only" in page
    assert "USED" not in page
    assert all(name in page for name in ("epoch-1", "epoch-3", "mixval_intra"))


def test_chosen__weights_are_those_of_its_epoch(source: Path, target: Path, tmp_path: Path) -> None:
    settings = {"candidates": 2, "weight": 5.0, "scorers": ["im"]}
    found = adapt(source, target, tmp_path / "r", "bnm", epochs=4, adapt=settings)
    told = found["adaptation"]
    assert {row["name"] for row in told["candidates"]} == {"source_only", "epoch-2", "epoch-4"}
    assert told["promoted"] is True
    step = next(row["step"] for row in told["candidates"] if row["name"] == told["chosen"])
    assert found["selected_step"] == step
    kept = load_file(tmp_path / "r" / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
    assert same(weights(tmp_path / "r"), kept)
    assert not same(weights(tmp_path / "r"), weights(tmp_path / "r" / "source_only"))


def test_candidates__are_spread_and_the_last_is_one() -> None:
    assert candidate_steps(5, 10, 7) == {2: 14, 4: 28, 6: 42, 8: 56, 10: 70}
    assert candidate_steps(5, 3, 2) == {1: 2, 2: 4, 3: 6}
    assert candidate_steps(1, 9, 1) == {9: 9}
    assert list(candidate_steps(4, 10, 1)) == [3, 5, 8, 10]


# -- what is learned -------------------------------------------------------------------------------------


def test_source_only__of_another_run_is_taken_where_it_is_the_same(
    source: Path, target: Path, tmp_path: Path
) -> None:
    adapt(source, target, tmp_path / "first", "mcc")
    ready = tmp_path / "first" / "source_only"
    adapt(source, target, tmp_path / "second", "mcc", adapt={"source_only": ready})
    assert not (tmp_path / "second" / "source_only").exists()
    assert choice(tmp_path / "first") == choice(tmp_path / "second")
    assert same(weights(tmp_path / "first"), weights(tmp_path / "second"))
    with pytest.raises(RecipeError, match="batch_size"):
        adapt(source, target, tmp_path / "third", "mcc", adapt={"source_only": ready}, batch_size=8)
    other = make_images(tmp_path / "other", {"a": 9, "b": 9, "c": 9})
    with pytest.raises(RecipeError, match="was made with other data"):
        adapt(other, target, tmp_path / "fourth", "mcc", adapt={"source_only": ready})


def test_weight_zero__is_source_only_but_for_the_chosen_epoch(
    source: Path, target: Path, tmp_path: Path
) -> None:
    adapt(source, target, tmp_path / "r", "deep_coral", adapt={"weight": 0.0})
    last = sorted((tmp_path / "r" / "checkpoints").iterdir())[-1].name
    first, second = (
        load_file(tmp_path / "r" / folder / "checkpoints" / last / "model.safetensors")
        for folder in (".", "source_only")
    )
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-6


def test_metrics__tell_the_transfer_loss_and_its_weight(source: Path, target: Path, tmp_path: Path) -> None:
    adapt(source, target, tmp_path / "r", "mcc", adapt={"schedule": "rise", "weight": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if "transfer_loss" in line]
    assert len(told) == 8
    strengths = [line["adapt_weight"] for line in told]
    middle = [(line["samples"] - (16 if line["step"] % 4 else 12) / 2) / 120 for line in told]
    assert strengths == pytest.approx([2 * np.tanh(5 * done) for done in middle])
    assert all(0 < line["transfer_loss"] < 2 for line in told)
    plain = (tmp_path / "r" / "source_only" / "metrics.jsonl").read_text()
    assert "transfer_loss" not in plain


def test_adabn__mends_what_statistics_can(source: Path, tmp_path: Path) -> None:
    pictures = make_images(tmp_path / "plain" / "train", {"a": 30, "b": 30, "c": 30}, seed=7).parent
    dim = tmp_path / "dim"
    for file in sorted(pictures.rglob("*.png")):
        to = dim / file.relative_to(pictures)
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((np.asarray(Image.open(file)) * 0.25 + 150).astype(np.uint8)).save(to)
    found = adapt(source, dim, tmp_path / "r", "adabn", model="tests.nets:recording_cnn", epochs=12)
    rows = {row["name"]: row["test"] for row in found["adaptation"]["candidates"]}
    assert rows["adabn"] > rows["source_only"] + 0.2
    before, after = weights(tmp_path / "r" / "source_only"), weights(tmp_path / "r")
    if found["adaptation"]["promoted"]:
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved
        assert all("running" in name or "num_batches" in name for name in moved)


def test_adabn__without_batchnorm_is_refused(source: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no BatchNorm layer"):
        adapt(source, target, tmp_path / "r", "adabn")


@pytest.mark.parametrize("method", ["shot", "adabn"])
def test_source_free__needs_a_bundle_and_the_target_alone(
    source: Path, target: Path, tmp_path: Path, method: str
) -> None:
    api.finetune(out=tmp_path / "s", **{**SMALL, "data": str(source), "model": "tests.nets:recording_cnn"})
    bundle = str(tmp_path / "s" / "bundle")
    more = {"model": bundle, "weights": "default", "image_size": None, "trust_code": True}
    found = adapt(None, target, tmp_path / "r", method, **more)
    assert not (tmp_path / "r" / "source_only").exists()
    rows = found["adaptation"]["candidates"]
    assert all(row["answers"]["source_accuracy"] is None for row in rows)
    assert set(found["adaptation"]["left_out"]) == {"dev", "iw"}, "they need the source"
    assert load_bundle(tmp_path / "r", trust_code=True)[1].classes == ("a", "b", "c")
    before = weights(tmp_path / "s")
    if method == "shot":
        steps = sorted((tmp_path / "r" / "checkpoints").iterdir())
        after = load_file(steps[-1] / "model.safetensors")
        assert "9.weight" not in after, "a frozen head is not even saved"
        assert not torch.equal(after["1.weight"], before["1.weight"])
        if found["adaptation"]["promoted"]:
            assert torch.equal(weights(tmp_path / "r")["10.weight"], before["10.weight"])
            assert found["frozen"]["equal"] is True


def test_shot__labels_of_an_epoch_are_made_once_and_read_from_disk(
    source: Path, target: Path, tmp_path: Path
) -> None:
    made, found = [], []
    for name in ("own", "others"):
        out = tmp_path / name
        adapt(source, target, out, "shot", epochs=1)
        if name == "others":
            np.save(out / "pseudo_labels" / "epoch-0001.npy", (made[0] + 1) % 3)
        adapt(source, target, out, "shot", epochs=2)
        made.append(np.load(out / "pseudo_labels" / "epoch-0001.npy"))
        last = sorted((out / "checkpoints").iterdir())[-1]
        found.append(load_file(last / "model.safetensors"))
    assert made[0].shape == (36,)
    assert made[1].tolist() == ((made[0] + 1) % 3).tolist(), "what is there stays"
    assert not same(*found), "and is what is learned"


def test_source_free__with_the_name_of_a_model_is_refused(target: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs a model of the source: give a bundle"):
        adapt(None, target, tmp_path / "r", "shot")


def test_cache__frozen_part_is_computed_once_for_both_domains(
    source: Path, target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = {"train": "last:1", "epochs": 2, "adapt": {"weight": 50.0}}
    adapt(source, target, tmp_path / "off", "deep_coral", **frozen)
    capsys.readouterr()
    adapt(source, target, tmp_path / "on", "deep_coral", **{**frozen, "cache": "auto"})
    assert capsys.readouterr().out.count("computed once") == 2, "source-only, and the adaptation"
    last = sorted((tmp_path / "on" / "checkpoints").iterdir())[-1].name
    first, second = (
        load_file(tmp_path / out / "checkpoints" / last / "model.safetensors") for out in ("on", "off")
    )
    assert first.keys() == second.keys()
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-6


def test_sources__several_are_joined(source: Path, target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_images(other / "train", {"a": 4, "b": 4, "z": 5}, seed=11)
    make_images(other / "val", {"a": 1, "b": 1, "z": 2}, seed=12)
    found = adapt(None, target, tmp_path / "r", "mcc", data={"path": str(source), "also": [str(other)]})
    assert summary(tmp_path / "r" / "source_only")["train_images"] == 60 + 13
    assert found["status"] == "done"
    assert load_bundle(tmp_path / "r", trust_code=True)[1].classes == ("a", "b", "c", "z")


def test_own_function__is_a_method(source: Path, target: Path, tmp_path: Path) -> None:
    found = adapt(source, target, tmp_path / "r", "tests.finetune.test_adapt:nothing")
    assert found["adaptation"]["method"] == "tests.finetune.test_adapt:nothing"


def nothing(pair: Pair) -> Tensor:
    """A method that sees all and wants nothing."""
    assert pair.source.logits.shape[1] == pair.target.logits.shape[1] == 3
    assert len(pair.labels) == len(pair.source.logits)
    assert int(pair.labels.min()) >= 0
    return pair.target.features.sum() * 0


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("mcc", "dann", "shot")])
def test_methods__each_runs_to_the_end(source: Path, target: Path, tmp_path: Path, method: str) -> None:
    found = adapt(source, target, tmp_path / "r", method, epochs=1)
    assert found["status"] == "done"
    assert 0 <= found["target_test"]["accuracy"] <= 1
    assert "auxiliary" not in " ".join(weights(tmp_path / "r"))


# -- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapt": {"method": "mcc"}}, r"adapt.target=D is missing"),
        ({"adapt": {"target": {"path": "x"}}}, r"adapt.method=NAME is missing"),
        ({}, r"data= is missing"),
        ({"data": "d", "patience": 2, "augment": {"mixup": 0.1}}, r"augment.mixup, patience: not with"),
        ({"data": "d", "gradient_accumulation": 2}, r"gradient_accumulation: not with adapt.method"),
        ({"data": "d", "train": "head", "sweep": {"lr": [0.1]}}, r"sweep.\*: not with adapt.method"),
    ],
)
def test_recipe__says_what_does_not_go_together(settings: dict[str, Any], words: str) -> None:
    adapt = settings.get("adapt", {"method": "mcc", "target": {"path": "x"}} if "data" in settings else {})
    if "adapt" in settings:
        settings = {**settings, "data": "d"}
    with pytest.raises(RecipeError, match=words):
        api.finetune(**{**SMALL, "out": "r", **settings, "adapt": adapt})


def test_method__unknown_lists_the_close_ones(source: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"method=dan_: unknown\. .*dan"):
        adapt(source, target, tmp_path / "r", "dan_")
    assert not (tmp_path / "r").exists(), "said before anything is trained"


def test_scorers__unknown_ones_are_said_before_anything_is_trained(
    source: Path, target: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"adapt.scorers=entropie: unknown\. .*entropy"):
        adapt(source, target, tmp_path / "r", "mcc", adapt={"scorers": ["snd", "entropie"]})
    assert not (tmp_path / "r").exists()


def test_head_alone__has_no_features_to_move(source: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"adapt.method=deep_coral changes the features, and train=head"):
        adapt(source, target, tmp_path / "r", "deep_coral", train="head")


def test_target__of_one_image_is_refused(source: Path, tmp_path: Path) -> None:
    make_images(tmp_path / "t", {"a": 1})
    with pytest.raises(DomainError, match="1 images to adapt to"):
        adapt(source, tmp_path / "t", tmp_path / "r", "mcc")
