"""Fine-tuning from the outside: what is learned, what stays frozen, what the bundle is worth elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from tests.support import class_image, encode, make_images
from tests.support_processes import RanksFailed, run_ranks
from tldist import api
from tldist.errors import BundleError, DomainError, MachineError, ModelError, RecipeError
from tldist.models.load import load_bundle, start_model
from tldist.runtime.preprocess import normalize, prepare

SMALL = {
    "weights": "none",
    "image_size": 32,
    "precision": "fp32",
    "batch_size": 16,
    "workers": 0,
    "optimizer": {"lr": 3e-3},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data") / "d", {"cat": 24, "dog": 20, "emu": 16})


@pytest.fixture(scope="module")
def run_folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "r"
    api.finetune(data=str(data), model="resnet18", out=out, epochs=6, augment={"crop": None}, **SMALL)
    return out


def summary(out: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((out / "summary.json").read_text())


def test_bundle__loads_in_torchvision_without_tldist(run_folder: Path, data: Path) -> None:
    model = torchvision.models.resnet18(num_classes=3)
    model.load_state_dict(load_file(run_folder / "bundle" / "model.safetensors"))
    ours, config = load_bundle(run_folder)
    image = prepare((data / "cat" / "3.png").read_bytes(), config.preprocessing)[None]
    inputs = torch.from_numpy(normalize(image, config.preprocessing.mean, config.preprocessing.std))
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), ours(inputs))


def test_finetune__learns_and_says_so(run_folder: Path) -> None:
    written = summary(run_folder)
    assert written["status"] == "done"
    assert written["validation"]["accuracy"] > 0.8
    assert written["validation"]["classes"] == ["cat", "dog", "emu"]
    assert written["train_images"] == 48
    losses = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in losses if "val_accuracy" in line] == [1, 2, 3, 4, 5, 6]
    assert (run_folder / "recipe.yaml").is_file()


def test_finetune__best_on_validation_becomes_the_bundle(run_folder: Path) -> None:
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "val_accuracy" in line]
    best = max(measured, key=lambda line: (line["val_accuracy"], -line["val_loss"]))
    assert summary(run_folder)["selected_step"] == best["step"]
    assert summary(run_folder)["validation"]["loss"] == pytest.approx(best["val_loss"], rel=1e-4)


@pytest.mark.parametrize(("model", "train"), [("resnet18", "head"), ("mobilenet_v2", "last:2")])
def test_frozen__is_frozen_batchnorm_and_all(data: Path, tmp_path: Path, model: str, train: str) -> None:
    api.finetune(data=str(data), model=model, train=train, out=tmp_path / "r", epochs=1, **SMALL)
    torch.manual_seed(0)
    built, _ = load_bundle(tmp_path / "r")
    from tldist.data.order import seed_of

    torch.manual_seed(seed_of("init", 0))
    before = start_model(model, "none", ("cat", "dog", "emu"), image_size=32).model.state_dict()
    after = built.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    learning = {"resnet18": ("fc.",), "mobilenet_v2": ("features.17.", "features.18.", "classifier.")}[model]
    assert changed
    assert all(name.startswith(learning) for name in changed), sorted(changed)
    proof = summary(tmp_path / "r")["frozen"]
    assert proof["equal"] is True
    assert proof["tensors"] == sum(not name.startswith(learning) for name in before)


def test_head__rows_are_taken_over_by_class_name(run_folder: Path) -> None:
    old, _ = load_bundle(run_folder)
    start = start_model(str(run_folder), "default", ("emu", "yak", "cat"))
    assert start.known_rows == 2
    new = start.model.state_dict()
    assert torch.equal(new["fc.weight"][0], old.state_dict()["fc.weight"][2])
    assert torch.equal(new["fc.bias"][2], old.state_dict()["fc.bias"][0])
    assert torch.equal(new["layer4.1.conv2.weight"], old.state_dict()["layer4.1.conv2.weight"])
    afresh = start_model(str(run_folder), "default", ("emu", "yak", "cat"), new_head=True)
    assert afresh.known_rows == 0


def test_resume__another_setting_is_refused_and_more_epochs_are_not(data: Path, tmp_path: Path) -> None:
    out, base = tmp_path / "r", {**SMALL, "data": str(data), "model": "tests.nets:plain_cnn"}
    api.finetune(out=out, epochs=1, **base)
    with pytest.raises(RecipeError, match=r"batch_size=16, now it is batch_size=8"):
        api.finetune(out=out, epochs=1, **{**base, "batch_size": 8})
    api.finetune(out=out, epochs=3, **base)
    assert summary(out)["steps"] == 9
    with pytest.raises(RecipeError, match="may grow, not shrink"):
        api.finetune(out=out, epochs=2, **base)
    other = make_images(tmp_path / "other", {"cat": 24, "dog": 20, "emu": 17})
    with pytest.raises(RecipeError, match="other data"):
        api.finetune(out=out, epochs=3, **{**base, "data": str(other)})
    api.finetune(out=out, epochs=3, **{**base, "workers": 1})


# -- broken images ---------------------------------------------------------------------------------------


def broken_domain(folder: Path, broken: int) -> Path:
    make_images(folder / "train", {"a": 30, "b": 30})
    make_images(folder / "val", {"a": 5, "b": 5})
    good = encode(class_image(0, np.random.default_rng(0)))
    contents = [b"", b"not an image", good[: len(good) // 2]]
    for number in range(broken):
        (folder / "train" / "a" / f"{number}.png").write_bytes(contents[number % 3])
    return folder


def train_broken(folder: Path, out: Path, max_bad: float) -> None:
    settings = {**SMALL, "data": {"path": str(folder), "max_bad": max_bad}, "model": "tests.nets:plain_cnn"}
    api.finetune(out=out, epochs=2, **settings)


def test_broken_images__are_skipped_and_listed_alike_on_every_rank(tmp_path: Path) -> None:
    folder = broken_domain(tmp_path / "d", 3)
    run_ranks(train_broken, 1, folder, tmp_path / "one", 0.05)
    run_ranks(train_broken, 2, folder, tmp_path / "two", 0.05)
    for out in (tmp_path / "one", tmp_path / "two"):
        listed = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
        assert [entry["id"] for entry in listed] == [f"train/a/{n}.png" for n in range(3)]
        assert listed[0]["reason"] == "empty file"
        assert summary(out)["broken_images"] == 3
    first, second = (load_file(tmp_path / n / "bundle" / "model.safetensors") for n in ("one", "two"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-5


def test_broken_images__too_many_stop_every_rank_with_the_same_error(tmp_path: Path) -> None:
    folder = broken_domain(tmp_path / "d", 3)
    with pytest.raises(RanksFailed) as failure:
        run_ranks(train_broken, 2, folder, tmp_path / "r", 0.01)
    assert set(failure.value.errors) == {0, 1}
    for kind, text in failure.value.errors.values():
        assert kind == "DomainError"
        assert "3 of 60 images are broken" in text
        assert "train/a/0.png" in text
    assert summary(tmp_path / "r")["status"] == "failed"


# -- what is refused -------------------------------------------------------------------------------------


def finetune_with(tmp_path: Path, **settings: object) -> None:
    api.finetune(**{**SMALL, "out": tmp_path / "r", "model": "resnet18", **settings})


def test_refused__names_the_thing_and_leaves_nothing(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "squeeze.safetensors"
    save_file(torchvision.models.squeezenet1_1().state_dict(), other)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(other.read_bytes()[:1000])
    whole_model = tmp_path / "whole.pth"
    torch.save(torch.nn.Linear(2, 2), whole_model)
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"model": "resnet81"}, ModelError, "unknown model 'resnet81'.*resnet18"),
        ({"weights": str(other)}, ModelError, "not the weights of ResNet"),
        ({"weights": str(cut)}, BundleError, "damaged or truncated"),
        ({"weights": str(whole_model)}, BundleError, "more than weights"),
        ({"weights": "IMAGENET9"}, ModelError, "IMAGENET1K_V1"),
        ({"weights": str(tmp_path / "no.safetensors")}, BundleError, "no such weights file"),
        ({"model": str(tmp_path)}, BundleError, "not a bundle"),
        ({"model": "tests.nets:nothing"}, ModelError, "cannot be imported"),
        ({"data": str(tmp_path / "nowhere")}, DomainError, "no such folder"),
        ({"train": "last:99"}, RecipeError, "the backbone has 5 blocks"),
        ({"train": "tail"}, RecipeError, "expected head, last:N, all or re:PATTERN"),
        ({"precision": "fp16"}, MachineError, "silently train in fp32"),
        ({"epochs": "many"}, RecipeError, "epochs: .*found 'many'"),
        ({"optimizer": {"rl": 1}}, RecipeError, "unknown setting 'optimizer.rl'.*optimizer.lr"),
    ]
    for settings, error, message in cases:
        with pytest.raises(error, match=message):
            finetune_with(tmp_path, **{"data": str(data), **settings})
        assert not (tmp_path / "r" / "bundle").exists(), settings
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(RecipeError, match="not a tldist run"):
        finetune_with(tmp_path, data=str(data), out=tmp_path / "mine")


def test_refused__class_lists_that_differ(tmp_path: Path) -> None:
    make_images(tmp_path / "d" / "train", {"a": 4, "b": 4})
    make_images(tmp_path / "d" / "val", {"a": 2, "c": 2})
    with pytest.raises(DomainError, match=r"no images of: c\b"):
        finetune_with(tmp_path, data=str(tmp_path / "d"))


def test_refused__a_launcher_that_started_one_of_two(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What `accelerate launch --cpu --num_processes 2` sets for the one process that it starts.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(MachineError, match=r"accelerate launch --multi_gpu --num_processes 2 -m tldist"):
        finetune_with(tmp_path, data=str(data))


def test_refused__fsdp_without_a_device_that_has_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(MachineError, match="silently run plain DDP"):
        finetune_with(tmp_path, data=str(data))


def test_precision_auto__is_chosen_by_trial_written_and_kept(data: Path, tmp_path: Path) -> None:
    settings = {**SMALL, "data": str(data), "model": "tests.nets:plain_cnn", "out": tmp_path / "r"}
    del settings["precision"]
    api.finetune(epochs=1, **settings)
    chosen = json.loads((tmp_path / "r" / "precision.json").read_text())
    assert set(chosen["trial_ms"]) == {"fp32", "fp32 channels_last", "bf16", "bf16 channels_last"}
    name = chosen["precision"] + (" channels_last" if chosen["channels_last"] else "")
    assert chosen["trial_ms"][name] == min(chosen["trial_ms"].values())
    api.finetune(epochs=2, **settings)
    assert json.loads((tmp_path / "r" / "precision.json").read_text()) == chosen
