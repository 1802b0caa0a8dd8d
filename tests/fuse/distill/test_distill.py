"""Distillation from outside: what a student learns from whom, on which images, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.fuse.distill.driver import DistillRun, run
from tests.fuse.distill.pupils import accuracy, pixels, train_teacher, unlabelled
from tests.support import make_images
from tests.support_models import SMALL, make_bundle
from tests.support_processes import run_ranks
from tldist import distributed
from tldist.bundle import BundleConfig, read_bundle
from tldist.data.loader import Batch
from tldist.data.order import StepPlan
from tldist.domain import open_domain
from tldist.errors import BundleError, DomainError, ModelError, RecipeError
from tldist.features.cache import FeatureCache
from tldist.fuse.distill.domains import split_target
from tldist.fuse.distill.judge import judge
from tldist.fuse.distill.recipe import DistillRecipe
from tldist.fuse.distill.run import Distilled
from tldist.fuse.distill.targets import feature_moments, from_file, from_teachers, load_outputs
from tldist.fuse.distill.teachers import answering, layout_of, load_teachers
from tldist.models.load import load_bundle, save_bundle
from tldist.models.zoo import describe_network
from tldist.recipe import read_recipe
from tldist.runtime.preprocess import Preprocessing
from tldist.training.precision import Numerics
from tldist.training.signals import StopFlag

NAMES = ("a", "b", "c", "d")
FP32 = Numerics("fp32", False, "", {})
OTHER_SIZE = Preprocessing(height=24, width=28, resize=28, interpolation="bicubic", mean=(0.5, 0.4, 0.3))
"""Not the student's size, aspect ratio or normalisation."""
BASE: dict[str, Any] = {
    "model": "tests.nets:plain_cnn", "weights": "none", "image_size": 32, "precision": "fp32",
    "epochs": 2, "batch_size": 8, "lr": 0.01, "augment": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of four classes: with labels, without, and others to measure on."""
    root = tmp_path_factory.mktemp("images")
    make_images(root / "labelled", dict.fromkeys(NAMES, 30))
    make_images(root / "test", dict.fromkeys(NAMES, 25), seed=5)
    unlabelled(root / "unlabelled", NAMES, 40, seed=3)
    unlabelled(root / "few", NAMES, 6, seed=4)
    make_images(root / "few_labelled", dict.fromkeys(NAMES, 6), seed=6)
    return root


@pytest.fixture(scope="module")
def halves(root: Path) -> list[Path]:
    """Two teachers, each of two classes; the second has another input size."""
    return [
        train_teacher(root / "ab", root / "labelled", ("a", "b")),
        train_teacher(root / "dc", root / "labelled", ("d", "c"), how=OTHER_SIZE),
    ]


def distilled(
    teachers: list[Path], data: Path, out: Path, shares: tuple[float, ...] | None = None, **settings: Any
) -> Distilled:
    recipe = DistillRun.make(
        teachers=tuple(teachers), data=str(data), out=out, distill={**BASE, **settings},
        shares=shares,
    )  # fmt: skip
    return run(recipe)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "bundle" / "model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


# -- what is learned -------------------------------------------------------------------------------------


def test_distill__two_halves_of_the_classes_become_one_model_without_labels(
    tmp_path: Path, root: Path, halves: list[Path]
) -> None:
    found = distilled(halves, root / "unlabelled", tmp_path / "run", epochs=20, batch_size=16)
    config = read_bundle(tmp_path / "run")[1]
    assert config.classes == NAMES
    assert config.preprocessing.height == 32
    assert found.notes["selected_by"] == "distillation loss on held-out images"
    alone = [accuracy(teacher, root / "test") for teacher in halves]
    assert max(alone) <= 0.5
    assert accuracy(tmp_path / "run" / "bundle", root / "test") > 0.85


def test_distill__a_student_of_another_architecture_learns(
    tmp_path: Path, root: Path, halves: list[Path]
) -> None:
    distilled(
        halves, root / "unlabelled", tmp_path / "run", model="resnet18", epochs=4, batch_size=16,
        lr=3e-3, features=0.1,
    )  # fmt: skip
    assert read_bundle(tmp_path / "run")[1].model["name"] == "resnet18"
    assert accuracy(tmp_path / "run" / "bundle", root / "test") > 0.7
    names = set(weights(tmp_path / "run"))
    assert names == set(make_model_names("resnet18"))


def make_model_names(name: str) -> list[str]:
    from torchvision import models

    return list(models.get_model(name, weights=None, num_classes=4).state_dict())


def test_distill__labels_teach_a_class_that_no_teacher_knows(
    tmp_path: Path, root: Path, halves: list[Path]
) -> None:
    found = distilled(halves[:1], root / "labelled", tmp_path / "run", epochs=15, batch_size=16)
    assert read_bundle(tmp_path / "run")[1].classes == NAMES
    assert found.notes["selected_by"] == "validation accuracy"
    assert found.config.metrics["val_accuracy"] == found.notes["validation"]["accuracy"]
    assert accuracy(tmp_path / "run" / "bundle", root / "test") > 0.85


def test_distill__labels_without_a_share_are_not_read(tmp_path: Path, root: Path, halves: list[Path]) -> None:
    """Images with wrong labels, and a class that nobody knows, teach what images without labels do."""
    wrong = tmp_path / "wrong"
    files = sorted((root / "few").iterdir())
    for place, file in enumerate(files):
        folder = wrong / ("zebra" if place % 2 else "a")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file.name)
    common = {"validation": 0.0, "labels_share": 0.0, "batch_size": 24}  # one batch: order is no matter
    distilled(halves, wrong, tmp_path / "labels", **common)
    distilled(halves, root / "few", tmp_path / "none", **common)
    assert read_bundle(tmp_path / "labels")[1].classes == NAMES
    assert largest_difference(tmp_path / "labels", tmp_path / "none") < 1e-5


def test_distill__order_of_classes_in_teachers_does_not_matter(
    tmp_path: Path, root: Path, halves: list[Path]
) -> None:
    model, config = load_bundle(halves[0], trust_code=True)
    with torch.no_grad():
        for tensor in (model[-1].weight, model[-1].bias):
            tensor.copy_(tensor.flip(0).clone())
    save_bundle(tmp_path / "ba", model, replace(config, classes=config.classes[::-1]))
    for name, teachers in (("one", halves), ("other", [halves[1], tmp_path / "ba"])):
        distilled(teachers, root / "few_labelled", tmp_path / name)
    assert largest_difference(tmp_path / "one", tmp_path / "other") < 1e-5


def test_distill__a_teacher_is_heard_as_sure_as_it_is(tmp_path: Path, root: Path, halves: list[Path]) -> None:
    """A head ten times as large with a calibrated temperature of 10 is the same teacher."""
    model, config = load_bundle(halves[0], trust_code=True)
    with torch.no_grad():
        model[-1].weight.mul_(10)
        model[-1].bias.mul_(10)
    save_bundle(tmp_path / "loud", model, replace(config, temperature=10.0))
    for name, first in (("one", halves[0]), ("other", tmp_path / "loud")):
        distilled([first, halves[1]], root / "few", tmp_path / name)
    assert largest_difference(tmp_path / "one", tmp_path / "other") < 1e-5


def test_distill__shares_weigh_the_teachers(tmp_path: Path, root: Path, halves: list[Path]) -> None:
    other = make_bundle(tmp_path / "other", ("a", "b"), seed=3)
    distilled([halves[0]], root / "few", tmp_path / "alone")
    distilled([halves[0], other], root / "few", tmp_path / "all", shares=(3.0, 0.0))
    distilled([halves[0], other], root / "few", tmp_path / "both")
    assert largest_difference(tmp_path / "alone", tmp_path / "all") < 1e-6
    assert largest_difference(tmp_path / "alone", tmp_path / "both") > 1e-4


def test_distill__the_first_teacher_is_the_student_where_none_is_named(
    tmp_path: Path, root: Path, halves: list[Path]
) -> None:
    distilled(halves, root / "few", tmp_path / "run", model=None, weights="default", lr=1e-9)
    start, found = load_file(halves[0] / "model.safetensors"), weights(tmp_path / "run")
    assert torch.allclose(found["0.weight"], start["0.weight"], atol=1e-6)
    assert torch.allclose(found["6.weight"][:2], start["6.weight"], atol=1e-6)


@pytest.mark.parametrize("data", ["few", "few_labelled"])
def test_distill__best_and_last_weights(tmp_path: Path, root: Path, halves: list[Path], data: str) -> None:
    # A learning rate that rises to where it harms: the last weights are not the best.
    harmful = {"lr": 3.0, "warmup": 0.9, "epochs": 4, "validation": 0.4, "checkpoint": {"keep": 9}}
    for select in ("best", "last"):
        out = tmp_path / select
        found = distilled(halves, root / data, out, select=select, calibrate=False, **harmful)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        key = (
            (lambda m: m["val_distill_loss"])
            if data == "few"
            else (lambda m: (-m["val_accuracy"], m["val_loss"]))
        )
        measured = [line for line in lines if "loss" not in line]
        best, last = min(measured, key=key)["step"], measured[-1]["step"]
        assert best != last
        step = best if select == "best" else last
        assert found.notes["selected_step"] == step
        kept = load_file(out / "checkpoints" / f"step-{step:08d}" / "model.safetensors")
        for name, tensor in weights(out).items():
            assert torch.equal(tensor, kept[f"net.{name}"]), name


# -- the teachers' outputs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"features": 0.5, "gradient_accumulation": 2},
        {"augment": {"views": 2}, "epochs": 4, "features": 0.5},
    ],
)
def test_distill__outputs_from_the_file_or_on_the_spot_are_the_same_training(
    tmp_path: Path, root: Path, halves: list[Path], settings: dict[str, Any]
) -> None:
    file = distilled(halves, root / "few_labelled", tmp_path / "file", **settings)
    spot = distilled(halves, root / "few_labelled", tmp_path / "spot", cache="off", **settings)
    assert file.notes["teacher_outputs"].startswith("once")
    assert spot.notes["teacher_outputs"].startswith("on every batch")
    assert largest_difference(tmp_path / "file", tmp_path / "spot") < 1e-5
    assert losses(tmp_path / "file") == pytest.approx(losses(tmp_path / "spot"), rel=1e-4)


def test_distill__pieces_are_the_same_training(tmp_path: Path, root: Path, halves: list[Path]) -> None:
    for name, pieces in (("whole", 1), ("pieces", 3)):
        distilled(
            halves, root / "few", tmp_path / name, features=0.5, augment=True, gradient_accumulation=pieces
        )
    assert largest_difference(tmp_path / "whole", tmp_path / "pieces") < 1e-5


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("pieces", [1, 2])
def test_distill__a_broken_image_teaches_nothing(
    tmp_path: Path, root: Path, halves: list[Path], cache: str, pieces: int
) -> None:
    shutil.copytree(root / "few", tmp_path / "data")
    (tmp_path / "data" / "0-a.png").write_bytes(b"not an image")
    data = {"path": str(tmp_path / "data"), "max_bad": 0.1}
    settings = {**BASE, "cache": cache, "gradient_accumulation": pieces, "validation": 0.0, "batch_size": 24}
    found = run(DistillRun.make(teachers=tuple(halves), data=data, out=tmp_path / "bad", distill=settings))
    assert found.notes["broken_images"] == 1
    (tmp_path / "data" / "0-a.png").unlink()
    distilled(halves, tmp_path / "data", tmp_path / "good", validation=0.0, batch_size=24)
    # One step an epoch, and its loss is the mean over whole images. The learning rate counts all images.
    assert losses(tmp_path / "bad")[0] == pytest.approx(losses(tmp_path / "good")[0], rel=1e-4)


def test_outputs__of_an_image_that_could_not_be_read_then_teach_nothing_now() -> None:
    outputs = torch.arange(12.0).view(2, 3, 2)
    cache = FeatureCache(outputs.numpy(), np.array([True, False, True]), {1: "gone"}, True)
    batch = Batch(
        torch.zeros(2, 4, 4, 3, dtype=torch.uint8), torch.zeros(2), torch.tensor([1, 2]),
        torch.tensor([True, True]), [], StepPlan(5, 3, 2, np.array([1, 2])),
    )  # fmt: skip
    teach = from_file(cache, np.array([7, 8, -1]))
    found = teach(batch)
    assert found.valid.tolist() == [False, True]
    assert found.broken == [(1, "gone")]
    assert found.labels.tolist() == [[8, 8, 9], [-1, 10, 11]], "epoch 3 of two views has the second"
    assert teach(found).broken == [(1, "gone")]


def test_distill__in_bf16_is_nearly_the_same(tmp_path: Path, root: Path, halves: list[Path]) -> None:
    for precision in ("fp32", "bf16"):
        distilled(halves, root / "few", tmp_path / precision, features=0.5, precision=precision)
    assert losses(tmp_path / "bf16")[:2] == pytest.approx(losses(tmp_path / "fp32")[:2], rel=0.05)
    assert weights(tmp_path / "bf16")["0.weight"].dtype == torch.float32


def test_outputs__are_read_again_and_computed_again_where_anything_differs(
    tmp_path: Path, root: Path, halves: list[Path]
) -> None:
    team, domain = distributed.start(), open_domain(str(root / "few"))

    def load(teachers: list[Path], how: Preprocessing = SMALL, seed: int = 0, **settings: Any) -> Any:
        found = load_teachers(teachers, trust_code=True)
        recipe = DistillRecipe.make(**{"augment": False, **settings})
        layout = layout_of(found, recipe.features > 0)
        return load_outputs(
            found, layout, recipe, domain, how, FP32, team, tmp_path,
            training=True, seed=seed, workers=0, stop=StopFlag(),
        )  # fmt: skip

    first = load(halves)
    assert not first.reused
    assert first.features.shape == (1, 24, 4)
    assert load(halves, seed=1, temperature=2.0, labels_share=0.1).reused
    for other in (
        lambda: load(halves[::-1]),
        lambda: load(halves, how=replace(SMALL, resize=40)),
        lambda: load(halves, features=1.0),
        lambda: load(halves, cache_dtype="fp16"),
        lambda: load(halves, augment={"views": 2}),
        lambda: load(halves, augment={"views": 2}, seed=1),
    ):
        assert not other().reused
        assert other().reused
    half = load(halves, cache_dtype="fp16")
    assert half.features.dtype == np.float16
    assert torch.allclose(half.read(0, np.arange(24)), first.read(0, np.arange(24)), rtol=1e-3, atol=1e-3)
    left = tmp_path / ".tmp-000000000000-x"
    left.mkdir()
    load(halves)
    assert not left.exists(), "what a killed start left is removed"


def test_teachers__see_the_pixels_through_their_own_size_and_normalisation(
    root: Path, halves: list[Path]
) -> None:
    teachers = load_teachers(halves, [1.0, 3.0], trust_code=True)
    assert [teacher.share for teacher in teachers] == [0.25, 0.75]
    images = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8)
    found = answering(teachers, layout_of(teachers, True), FP32, most=2)(images)
    picture = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).double(), (24, 28), mode="bicubic", antialias=True
    ).clamp(0, 255)
    mean, std = (
        torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1)
        for values in (OTHER_SIZE.mean, OTHER_SIZE.std)
    )
    net = teachers[1].net.double()
    with torch.no_grad():
        features = net[:-1]((picture / 255 - mean) / std)
        logits = net[-1](features)
    assert torch.allclose(found[:, 2:4].double(), logits, atol=1e-4)
    assert torch.allclose(found[:, -64:].double(), features, atol=1e-4)


# -- processes -------------------------------------------------------------------------------------------


def _on_ranks(teachers: list[Path], data: list[Path], outs: list[Path], settings: dict[str, Any]) -> None:
    """Runs in each rank."""
    for source, out in zip(data, outs):
        distilled(teachers, source, out, **settings)


@pytest.mark.parametrize(
    "settings", [{"features": 0.5}, {"augment": True, "features": 0.5}, {"labels_share": 0.0}]
)
def test_processes__one_and_two_agree(tmp_path: Path, halves: list[Path], settings: dict[str, Any]) -> None:
    # With remainder 1 the second process has no image in the last step.
    data = []
    for size, labels in ((16, True), (17, True), (20, False), (17, False)):
        folder = tmp_path / f"data{size}{labels}"
        if labels:
            make_images(folder / "train", {"a": 7, "b": 6, "c": size - 13}, seed=size)
            make_images(folder / "val", {"a": 3, "b": 2, "c": 4}, seed=size + 100)
        else:
            unlabelled(folder / "train", "a", size, seed=size)
            unlabelled(folder / "val", "cd", 5, seed=size + 100)
        data.append(folder)
    outs = {ranks: [tmp_path / f"{ranks}-{folder.name}" for folder in data] for ranks in (1, 2)}
    for ranks in (1, 2):
        run_ranks(_on_ranks, ranks, halves, data, outs[ranks], settings)
    for one, two in zip(outs[1], outs[2]):
        assert largest_difference(one, two) < 1e-5
        first, second = (
            [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            for out in (one, two)
        )
        assert len(first) == len(second)
        for a, b in zip(first, second):
            for noise in ("images_per_second", "data_wait"):
                a.pop(noise, None)
                b.pop(noise, None)
            assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def _moments_and_agreement(teacher: Path, folder: Path) -> tuple[Any, ...]:
    """Runs in each rank: of the teacher's features, and of a student whose loss is an image's first logit."""
    team, domain = distributed.start(), replace(open_domain(str(folder)), max_bad=0.1)
    teachers = load_teachers([teacher], trust_code=True)
    layout = layout_of(teachers, True)
    answer = answering(teachers, layout, FP32)
    mean, scale = feature_moments(answer, layout, domain, SMALL, team, workers=0)

    def losses(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.labels[:, 1], batch.labels[:, 1] > batch.labels[:, 2]

    labels = np.full(len(domain), -1)
    teach = from_teachers(answer, labels, team.device)
    found = judge(losses, domain, SMALL, teach, team, batch_size=32)
    return mean, scale, found.loss, found.agreement, found.count


@pytest.mark.parametrize("ranks", [1, 2])
def test_processes__moments_and_agreement_are_those_of_whole_images(
    tmp_path: Path, halves: list[Path], ranks: int
) -> None:
    folder = unlabelled(tmp_path / "d", "abc", 50)
    whole = open_domain(str(folder))
    net = load_bundle(halves[0], trust_code=True)[0].double()
    with torch.no_grad():
        features = net[:-1](pixels(whole, SMALL).double())
        logits = net[-1](features)
    (folder / "0-broken.png").write_bytes(b"not an image")
    for found in run_ranks(_moments_and_agreement, ranks, halves[0], folder):
        mean, scale, loss, agreement, count = found
        assert torch.allclose(mean.double(), features.mean(0), atol=1e-6)
        spread = (features.var(0, correction=0) + 1e-5).sqrt()
        assert torch.allclose(scale.double(), spread, atol=1e-5)
        assert count == 150
        assert loss == pytest.approx(float(logits[:, 0].mean()), abs=1e-5)
        assert agreement == float((logits[:, 0] > logits[:, 1]).double().mean())


# -- what is refused -------------------------------------------------------------------------------------


def test_teachers__that_cannot_teach_are_refused(tmp_path: Path, halves: list[Path]) -> None:
    model, config = load_bundle(halves[0], trust_code=True)
    save_bundle(tmp_path / "several", model, replace(config, task="multilabel"))
    with pytest.raises(BundleError, match="one an image"):
        load_teachers([halves[0], tmp_path / "several"], trust_code=True)
    description = describe_network("tests.nets:plain_cnn", 2)
    save_bundle(tmp_path / "extractor", model, BundleConfig(description, (), SMALL))
    with pytest.raises(BundleError, match="without classes"):
        load_teachers([tmp_path / "extractor"], trust_code=True)


def test_teachers__that_are_not_finite_are_refused(tmp_path: Path, root: Path) -> None:
    broken = make_bundle(tmp_path / "nan", ("a", "b"), name="tests.nets:nan_cnn")
    with pytest.raises(ModelError, match="not finite"):
        distilled([broken], root / "few", tmp_path / "run")


def test_domains__a_test_split_is_not_learned_from(tmp_path: Path) -> None:
    make_images(tmp_path / "d" / "test", {"a": 2, "b": 2})
    domain = open_domain(str(tmp_path / "d"))
    with pytest.raises(DomainError, match="no train split"):
        split_target(domain, 0.2, 0)
    assert len(split_target(domain, 0.0, 0, split="test").train) == 4


def test_domains__a_share_is_held_out_without_labels(tmp_path: Path) -> None:
    unlabelled(tmp_path / "d", "ab", 10)
    found = split_target(open_domain(str(tmp_path / "d")), 0.2, 0)
    assert found.validation is not None
    assert (len(found.train), len(found.validation)) == (16, 4)
    ids = [{domain.id(i) for i in range(len(domain))} for domain in (found.train, found.validation)]
    assert not ids[0] & ids[1]


def test_recipe__plain_values_and_contradictions(tmp_path: Path) -> None:
    asked = ["T", "data=D", f"out={tmp_path}", "distill=resnet18", "distill.augment=false"]
    found = read_recipe(DistillRun, asked).distill
    assert found.model == "resnet18"
    assert found.augment.is_deterministic
    assert not DistillRecipe().augment.is_deterministic
    with pytest.raises(RecipeError, match="views"):
        DistillRecipe.make(augment={"use": False, "views": 2})
