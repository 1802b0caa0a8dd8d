"""Composites against NumPy in float64 from their members' own outputs; what their descriptions must be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, logsumexp, softmax
from torch import Tensor, nn

from tests.nets import plain_cnn
from tests.support_models import SMALL, lively_model
from tldist.bundle import BundleConfig
from tldist.errors import BundleError, ModelError
from tldist.models.blocks import cut_blocks, freeze, trainable_blocks
from tldist.models.composite import Concat, Ensemble
from tldist.models.composite_layout import EnsembleLayout, Input, read_layout
from tldist.models.description import architecture_name, build_model, num_outputs, with_outputs
from tldist.models.heads import find_head, tapped
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.split import split_model
from tldist.models.view import View, resize_weights
from tldist.models.zoo import describe_network
from tldist.runtime.preprocess import Preprocessing

CODE = "tests.nets:plain_cnn"
OTHER = Preprocessing(height=20, width=26, resize=26, mean=(0.5, 0.4, 0.3), std=(0.5, 0.2, 0.31))
INPUTS = (SMALL, OTHER, replace(SMALL, mean=OTHER.mean), replace(OTHER, height=40, width=32, resize=40))


def numpy_logits(model: nn.Module, images: Tensor, how: Preprocessing) -> np.ndarray:
    """A member's own answer in float64: pixels resized by PyTorch, then normalised its own way."""
    pixels = images.permute(0, 3, 1, 2).double() / 255
    size = (how.height, how.width)
    if pixels.shape[2:] != size:
        pixels = nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (how.mean, how.std))
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()((pixels - mean) / std).numpy()


def votes_by_name(
    logits: Sequence[np.ndarray], names: Sequence[Sequence[str]], classes: Sequence[str]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Logits of the classes that each member knows, in the composite's order; and who knows what (M, K)."""
    known = np.array([[name in own for name in classes] for own in names])
    gathered = [
        np.stack([values[:, list(own).index(name)] for name in classes if name in own], 1)
        for values, own in zip(logits, names)
    ]
    return gathered, known


def expected_logits(
    combine: str,
    task: str,
    gathered: Sequence[np.ndarray],
    known: np.ndarray,
    weights: np.ndarray,
    temperatures: Sequence[float],
) -> np.ndarray:
    """What the composite must answer, class by class."""
    answers = []
    for place in range(known.shape[1]):
        total, votes = 0.0, 0.0
        for member in np.flatnonzero(known[:, place]):
            column = int(known[member, :place].sum())
            z = gathered[member]
            if combine != "logits":
                z = z / temperatures[member]
                z = expit(z) if task == "multilabel" else softmax(z, 1)
            votes = votes + weights[member] * z[:, column]
            total += weights[member]
        answers.append(votes / total)
    found = np.stack(answers, 1)
    if combine == "logits":
        return found
    return np.log(found) - np.log1p(-found) if task == "multilabel" else np.log(found)


def describe_ensemble(
    combine: str,
    task: str,
    names: Sequence[Sequence[str]],
    classes: Sequence[str],
    hows: Sequence[Preprocessing],
    temperatures: Sequence[float],
) -> dict[str, Any]:
    members = [
        {
            "model": describe_network(CODE, len(own)),
            "input": Input.of(how).model_dump(),
            "rows": [list(own).index(name) if name in own else -1 for name in classes],
            "temperature": t,
        }
        for own, how, t in zip(names, hows, temperatures)
    ]
    own = Input.of(SMALL).model_dump()
    return {"type": "ensemble", "task": task, "combine": combine, "input": own, "members": members}


def random_ensemble(
    seed: int, combine: str, task: str = "multiclass", partial: bool = True
) -> tuple[dict[str, Any], Ensemble, list[nn.Module], list[list[str]], list[str], list[float]]:
    """Three members with classes in random orders, some of which they do not know."""
    random = np.random.default_rng(seed)
    classes = ["ant", "10", "2", "ümlaut", "e, f", "zebra"]
    random.shuffle(classes)
    names = []
    for member in range(3):
        count = int(random.integers(2, 6)) if partial and member else 6  # the first knows all
        names.append([str(name) for name in random.permutation(classes)[:count]])
    temperatures = [float(t) for t in random.uniform(0.4, 3, 3)]
    description = describe_ensemble(combine, task, names, classes, INPUTS[:3], temperatures)
    torch.manual_seed(seed)
    models = [plain_cnn(len(own)) for own in names]
    for model in models:
        nn.init.normal_(model[-1].weight, std=3)  # sure of itself, as a trained model is
    ensemble = Ensemble(read_layout(EnsembleLayout, description), models).eval()
    return description, ensemble, models, names, classes, temperatures


def some_images(seed: int = 0, count: int = 5, how: Preprocessing = SMALL) -> Tensor:
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.integers(0, 256, (count, how.height, how.width, 3), dtype=np.uint8))


@pytest.mark.parametrize("combine", ["logits", "probabilities", "stacking"])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize(("seed", "partial"), [(0, False), (1, True), (2, True)])
def test_ensemble__is_the_average_of_its_members_by_class_name(
    combine: str, task: str, seed: int, partial: bool
) -> None:
    _, ensemble, models, names, classes, temperatures = random_ensemble(seed, combine, task, partial)
    weights = np.random.default_rng(seed + 9).uniform(0.1, 1, 3)
    raw = torch.from_numpy(weights)[:, None] * ensemble.known
    ensemble.shares = (raw / raw.sum(0)).float()
    images = some_images(seed)
    logits = [numpy_logits(model, images, how) for model, how in zip(models, INPUTS)]
    expected = expected_logits(combine, task, *votes_by_name(logits, names, classes), weights, temperatures)
    with torch.no_grad():
        found = ensemble(input_tensor(images, SMALL)).double().numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)


def test_ensemble__probabilities_are_the_mean_where_all_know_all() -> None:
    _, ensemble, models, names, classes, temperatures = random_ensemble(5, "probabilities", partial=False)
    images = some_images(5)
    gathered, _ = votes_by_name(
        [numpy_logits(model, images, how) for model, how in zip(models, INPUTS)], names, classes
    )
    mean = np.mean([softmax(z / t, 1) for z, t in zip(gathered, temperatures)], 0)
    with torch.no_grad():
        found = ensemble(input_tensor(images, SMALL)).double().softmax(1).numpy()
    np.testing.assert_allclose(found, mean, atol=1e-5)


def test_ensemble__sure_members_do_not_underflow() -> None:
    _, ensemble, models, names, classes, _ = random_ensemble(3, "probabilities", partial=False)
    for model in models:
        model[-1].weight.data *= 300  # probabilities far below the smallest float32
    images = some_images(3)
    gathered, _ = votes_by_name(
        [numpy_logits(model, images, how) for model, how in zip(models, INPUTS)], names, classes
    )
    temperatures = ensemble.temperatures.flatten().double().numpy()
    logs = np.stack([log_softmax(z / t, 1) for z, t in zip(gathered, temperatures)])
    expected = logsumexp(logs, 0) - np.log(3)
    assert expected.min() < -200
    with torch.no_grad():
        found = ensemble(input_tensor(images, SMALL)).double().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_ensemble__of_one_member_is_that_member() -> None:
    description = describe_ensemble("logits", "multiclass", [["a", "b"]], ["a", "b"], [SMALL], [1.7])
    torch.manual_seed(0)
    model = plain_cnn(2)
    ensemble = Ensemble(read_layout(EnsembleLayout, description), [model]).eval()
    images = input_tensor(some_images(), SMALL)
    with torch.no_grad():
        assert torch.equal(ensemble(images), model(images))


def test_ensemble__features_are_its_members_side_by_side() -> None:
    _, ensemble, models, *_ = random_ensemble(4, "logits")
    images = input_tensor(some_images(), SMALL)
    seen = []
    with torch.no_grad():
        for member, model in zip(ensemble.members, models):
            with tapped(model) as features:
                model(member.view(images))
                seen.append(features())
        with tapped(ensemble) as features:
            ensemble(images)
            assert torch.equal(features(), torch.cat(seen, 1))


def test_ensemble__in_an_ensemble() -> None:
    inner, model, *_ = random_ensemble(6, "probabilities")
    classes = 6
    outer = {
        "type": "ensemble",
        "task": "multiclass",
        "combine": "logits",
        "input": inner["input"],
        "members": [
            {"model": inner, "input": inner["input"], "rows": [5, 4, 3, 2, 1, 0], "temperature": 1.0}
        ],
    }
    found = build_model(outer, trust_code=True).eval()
    assert isinstance(found, Ensemble)
    found.members[0].model.load_state_dict(model.state_dict())
    images = input_tensor(some_images(), SMALL)
    with torch.no_grad(), tapped(found) as features:
        assert torch.equal(found(images), model(images).flip(1))
        assert features().shape == (5, 3 * 64)
    assert num_outputs(outer) == classes


@pytest.mark.parametrize(("before", "after"), [(32, 20), (20, 32), (33, 7), (5, 5), (224, 96), (1, 4)])
def test_resize_weights__are_those_of_interpolate(before: int, after: int) -> None:
    weights = resize_weights(before, after)
    values = torch.randn(2, 3, before, 4, dtype=torch.float64)
    expected = nn.functional.interpolate(values, (after, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(weights.double() @ values, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(weights.sum(1), torch.ones(after))


@pytest.mark.parametrize("how", INPUTS)
def test_view__makes_the_members_input_of_the_composites(how: Preprocessing) -> None:
    images = some_images(2)
    expected = numpy_logits(nn.Identity(), images, how)
    found = View(Input.of(SMALL), Input.of(how))(input_tensor(images, SMALL))
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-5)


def test_view__of_the_same_input_does_nothing() -> None:
    images = torch.randn(2, 3, 32, 32)
    assert View(Input.of(SMALL), Input.of(SMALL))(images) is images


# -- concatenation -------------------------------------------------------------------------------------


def describe_concat(transforms: list[dict[str, Any]], head_in: int) -> dict[str, Any]:
    members = [
        {
            "model": describe_network("mobilenet_v3_small", 4),
            "input": Input.of(OTHER).model_dump(),
            "features": 1024,
        },
        {"model": describe_network(CODE, 3), "input": Input.of(SMALL).model_dump(), "features": 64},
    ]
    return {
        "type": "concat",
        "input": Input.of(SMALL).model_dump(),
        "members": members,
        "transforms": transforms,
        "head": {"type": "linear", "in": head_in, "out": 5},
    }


AFFINE = [{"type": "scale", "in": 1088, "out": 1088}, {"type": "affine", "in": 1088, "out": 7}]


def random_concat(transforms: list[dict[str, Any]]) -> tuple[dict[str, Any], Concat, list[nn.Module]]:
    description = describe_concat(transforms, transforms[-1]["out"] if transforms else 1088)
    concat = build_model(description, trust_code=True)
    assert isinstance(concat, Concat)
    torch.manual_seed(1)
    models = [lively_model("mobilenet_v3_small", 4), plain_cnn(3)]
    for branch, model in zip(concat.members, models):
        own = branch.model.state_dict()
        branch.model.load_state_dict({name: t for name, t in model.state_dict().items() if name in own})
    for transform in concat.transforms:
        transform.weight.normal_()
        transform.bias.normal_()
    return description, concat.eval(), models


@pytest.mark.parametrize("transforms", [[], AFFINE])
def test_concat__is_one_head_on_all_features(transforms: list[dict[str, Any]]) -> None:
    _, concat, models = random_concat(transforms)
    images = some_images(1)
    features = []
    for model, how in zip(models, (OTHER, SMALL)):
        wide = copy.deepcopy(model).double()
        with tapped(wide) as seen:
            numpy_logits_of(wide, images, how)
            features.append(seen().numpy())
    expected = np.concatenate(features, 1)
    for part in (*concat.transforms, concat.head):
        weight, bias = part.weight.detach().double().numpy(), part.bias.detach().double().numpy()
        expected = (expected * weight if weight.ndim == 1 else expected @ weight.T) + bias
    with torch.no_grad():
        found = concat(input_tensor(images, SMALL)).double().numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)


def numpy_logits_of(model: nn.Module, images: Tensor, how: Preprocessing) -> None:
    """One forward pass of this very model on its own float64 input."""
    own = numpy_logits(nn.Identity(), images, how)
    with torch.no_grad():
        model(torch.from_numpy(own))


def test_concat__has_a_block_a_member_and_one_head() -> None:
    description, concat, _ = random_concat(AFFINE)
    blocks = cut_blocks(concat)
    assert [block.name for block in blocks] == ["members.0", "members.1", "head"]
    assert find_head(concat)[0] == "head"
    learning = trainable_blocks(concat, blocks, "last:1")
    freeze(concat, learning)
    learns = {name.split(".")[1] for name, p in concat.named_parameters() if p.requires_grad}
    assert learns == {"1", "weight", "bias"}
    assert build_model(with_outputs(description, 9), trust_code=True).head.out_features == 9


def test_concat__is_cut_before_its_head() -> None:
    _, concat, _ = random_concat(AFFINE)
    blocks = cut_blocks(concat)
    prefix, suffix = split_model(concat, blocks, trainable_blocks(concat, blocks, "head"))
    images = input_tensor(some_images(), SMALL)
    with torch.no_grad():
        assert torch.equal(suffix(prefix(images)), concat(images))
    assert len(list(suffix.parameters())) == 2


def test_chain__on_a_concat() -> None:
    description, concat, _ = random_concat([])
    chained = {
        "type": "chain",
        "backbone": description,
        "transforms": [{"type": "scale", "in": 1088, "out": 1088}],
        "head": {"type": "linear", "in": 1088, "out": 2},
    }
    chain = build_model(chained, trust_code=True).eval()
    own = {f"backbone.{n}": t for n, t in concat.state_dict().items() if not n.startswith("head.")}
    chain.load_state_dict(own, strict=False)
    images = input_tensor(some_images(), SMALL)
    with torch.no_grad(), tapped(chain) as features, tapped(concat) as expected:
        chain(images), concat(images)
        assert torch.equal(features(), expected())


# -- bundles -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ensemble", "concat", "projected"])
def test_bundle__of_a_composite_comes_back_to_the_bit(tmp_path: Path, kind: str) -> None:
    if kind == "ensemble":
        description, model, *_, classes, _ = random_ensemble(7, "stacking")
        model.shares = torch.rand(model.shares.shape) * model.known
    else:
        description, model, _ = random_concat(AFFINE if kind == "projected" else [])
        classes = list("abcde")
    saved = save_bundle(tmp_path / "b", model, BundleConfig(description, tuple(classes), SMALL))
    loaded, config = load_bundle(tmp_path / "b", trust_code=True)
    assert config == saved
    images = input_tensor(some_images(), SMALL)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ModelError, match="trust_code"):
        load_bundle(tmp_path / "b")


def test_bundle__whose_preprocessing_is_not_the_composites_is_refused(tmp_path: Path) -> None:
    description, model, *_, classes, _ = random_ensemble(7, "logits")
    for how, task in ((OTHER, "multiclass"), (SMALL, "multilabel")):
        with pytest.raises(BundleError, match=r"composite takes|the ensemble is"):
            save_bundle(tmp_path / "b", model, BundleConfig(description, tuple(classes), how, task=task))
    assert not (tmp_path / "b").exists()


def test_names__say_what_is_in_it() -> None:
    ensemble, concat = random_ensemble(0, "logits")[0], random_concat(AFFINE)[0]
    assert architecture_name(ensemble) == f"ensemble ({CODE}, {CODE}, {CODE}) by logits"
    assert architecture_name(concat) == f"mobilenet_v3_small + {CODE} -> scale -> affine -> linear"


# -- hostile descriptions ------------------------------------------------------------------------------


def _set(path: str, value: Any) -> Any:
    """A change of the value at a dotted path."""

    def change(description: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        where: Any = description
        for name in parents:
            where = where[int(name) if name.isdecimal() else name]
        if value is _set:
            del where[int(last) if last.isdecimal() else last]
        else:
            where[int(last) if last.isdecimal() else last] = value

    return change


ENSEMBLE_FAULTS = {
    "members": [], "members.0": "resnet18", "members.1.rows": [0, 1], "members.0.rows.0": 2.5,
    "members.0.rows.1": True, "members.0.rows.2": -2, "members.0.rows.3": 4000,
    "members.2.temperature": 0.0, "members.1.temperature": float("nan"), "members.1.temperatur": 1.0,
    "members.0.model": {"type": "oracle"}, "members.0.model.type": _set, "combine": "loudest",
    "task": "guess", "input": None, "input.height": 0, "input.width": 10**9, "input.std": [1.0, 0.0, 1.0],
    "input.mean": [0.5, 0.5], "members.1.input.mean": [0.5, float("inf"), 0.5], "members.1.input": _set,
    "extra": 1,
}  # fmt: skip


@pytest.mark.parametrize("path", ENSEMBLE_FAULTS)
def test_ensemble__hostile_descriptions_are_refused(path: str) -> None:
    description = random_ensemble(0, "logits", partial=False)[0]
    _set(path, ENSEMBLE_FAULTS[path])(description)
    with pytest.raises(BundleError):
        build_model(description, trust_code=True)


def test_ensemble__a_class_that_nobody_knows_is_refused() -> None:
    description = random_ensemble(0, "logits", partial=False)[0]
    for member in description["members"]:
        member["rows"][3] = -1
    with pytest.raises(BundleError, match="no member knows the class at place 3"):
        build_model(description, trust_code=True)


def test_ensemble__an_output_twice_is_refused() -> None:
    description = random_ensemble(0, "logits", partial=False)[0]
    description["members"][1]["rows"][0] = description["members"][1]["rows"][1]
    with pytest.raises(BundleError, match=r"members.1.*each once"):
        build_model(description, trust_code=True)


CONCAT_FAULTS = {
    "members.0.features": 1023, "members.1.model.num_classes": "many", "head.in": 1087, "head.out": 0,
    "head.type": "affine", "transforms": [{"type": "scale", "in": 1088, "out": 7}], "head": None,
    "transforms.1": {"type": "linear", "in": 1088, "out": 7}, "transforms.0.in": -1, "members": [],
    "input.height": "32", "projection": 3,
}  # fmt: skip


@pytest.mark.parametrize("path", CONCAT_FAULTS)
def test_concat__hostile_descriptions_are_refused(path: str) -> None:
    description = copy.deepcopy(describe_concat(AFFINE, 7))
    _set(path, CONCAT_FAULTS[path])(description)
    with pytest.raises(BundleError):
        build_model(description, trust_code=True)


def test_concat__a_wrong_width_that_adds_up_is_refused() -> None:
    description = describe_concat([], 1088)
    description["members"][0]["features"], description["members"][1]["features"] = 1000, 88
    with pytest.raises(BundleError, match="member 0 is said to have 1000 features"):
        build_model(description, trust_code=True)


def test_composite__without_end_is_refused() -> None:
    description = random_ensemble(0, "logits")[0]
    for _ in range(20):
        rows = list(range(6))
        member = {"model": description, "input": description["input"], "rows": rows, "temperature": 1.0}
        description = {**description, "members": [member]}
    with pytest.raises(BundleError, match="nested more than"):
        build_model(description, trust_code=True)


def test_composite__in_a_composite_must_take_what_it_is_given() -> None:
    inner = random_ensemble(0, "logits")[0]
    other = Input.of(OTHER).model_dump()
    member = {"model": inner, "input": other, "rows": list(range(6)), "temperature": 1.0}
    with pytest.raises(BundleError, match="another input than it is given"):
        build_model({**inner, "members": [member]}, trust_code=True)


def test_ensemble__has_no_head_and_says_what_to_do() -> None:
    description, ensemble, *_ = random_ensemble(0, "logits")
    for ask in (lambda: find_head(ensemble), lambda: with_outputs(description, 6)):
        with pytest.raises(ModelError, match="Distil it"):
            ask()
