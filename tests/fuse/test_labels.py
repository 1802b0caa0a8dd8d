"""Models that know different classes: what becomes of each, and that it is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import make_images
from tests.support_models import SMALL, lively_model, make_bundle
from tldist import api
from tldist.bundle import BundleConfig, read_bundle
from tldist.errors import RecipeError
from tldist.fuse.labels import plan_classes, short_names
from tldist.models.load import save_bundle
from tldist.models.zoo import describe_network

FIVE = ("a", "b", "c", "d", "e")
SEVEN = ("g", "f", "e", "d", "x", "y", "z")


def near_bundle(folder: Path, classes: tuple[str, ...], name: str, seed: int) -> Path:
    """A model near the one of seed 0, as if fine-tuned from it, with a head of its own."""
    model = lively_model(name, len(classes))
    origin = lively_model(name, 2).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for key, tensor in state.items():
        if key in origin and origin[key].shape == tensor.shape and tensor.dim() > 1:
            tensor.copy_(origin[key] * (1 + 0.01 * torch.randn(tensor.shape, generator=generator)))
        elif key.startswith("classifier"):
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
    save_bundle(folder, model, BundleConfig(describe_network(name, len(classes)), classes, SMALL))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    return [
        near_bundle(root / "five", FIVE, "squeezenet1_1", 1),
        near_bundle(root / "seven", SEVEN, "squeezenet1_1", 2),
    ]


def head_of(path: Path) -> dict[str, torch.Tensor]:
    folder, config = read_bundle(path)
    tensors = load_file(folder / "model.safetensors")
    return dict(zip(config.classes, tensors["classifier.1.weight"].flatten(1)))


def test_union__five_and_seven_classes_become_ten(
    tmp_path: Path, models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """What mergekit and FusionBench refuse by a size mismatch."""
    api.fuse(bundles=models, method="average", weights=(1, 3), out=tmp_path / "run")
    five, seven, found = head_of(models[0]), head_of(models[1]), head_of(tmp_path / "run")
    assert list(found) == [*FIVE, "g", "f", "x", "y", "z"]
    for name, row in found.items():
        both = name in five and name in seven
        expected = 0.25 * five[name] + 0.75 * seven[name] if both else five.get(name, seven.get(name))
        torch.testing.assert_close(row, expected)
    said = capsys.readouterr().out
    assert "3 from model 1 alone: a, b, c" in said
    assert "2 merged from all models: d, e" in said
    assert "5 from model 2 alone: g, f, x, y, z" in said
    fates = json.loads((tmp_path / "run" / "summary.json").read_text())["classes"]
    assert fates["from model 2 alone"] == ["g", "f", "x", "y", "z"]


def test_intersection__drops_and_says_so(
    tmp_path: Path, models: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    api.fuse(bundles=models, method="average", classes="intersection", out=tmp_path / "run")
    assert read_bundle(tmp_path / "run")[1].classes == ("d", "e")
    assert "8 dropped: a, b, c, g, f, x, y, z" in capsys.readouterr().out


def test_target__only_the_classes_of_data(tmp_path: Path, models: list[Path]) -> None:
    data = make_images(tmp_path / "data", {"e": 4, "z": 4, "a": 4})
    api.fuse(bundles=models, method="average", classes="target", data=data, out=tmp_path / "run", workers=0)
    found = head_of(tmp_path / "run")
    assert list(found) == ["a", "e", "z"]
    assert torch.equal(found["z"], head_of(models[1])["z"])
    # Neither parent knows all of them, the result does.
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["before"] == {}
    assert summary["after"]["count"] == 12


def test_separate__every_head_side_by_side(tmp_path: Path, models: list[Path]) -> None:
    api.fuse(bundles=models, method="average", heads="separate", out=tmp_path / "run")
    five, seven, found = head_of(models[0]), head_of(models[1]), head_of(tmp_path / "run")
    assert list(found) == [*(f"five/{name}" for name in FIVE), *(f"seven/{name}" for name in SEVEN)]
    assert torch.equal(found["five/e"], five["e"])
    assert torch.equal(found["seven/e"], seven["e"])


def test_rebuild__a_new_head_for_new_classes(tmp_path: Path) -> None:
    """Classes that no model knows are learned from labelled data; the merged backbone stays."""
    bundles = [near_bundle(tmp_path / f"m{n}", FIVE, "mobilenet_v3_small", n) for n in range(2)]
    data = tmp_path / "data"
    for seed, split in enumerate(("train", "val")):
        make_images(data / split, {"new": 20, "other": 20, "third": 20}, seed=seed)
    outcome = api.fuse(
        bundles=bundles,
        method="average",
        heads="rebuild",
        data=data,
        statistics="pooled",
        out=tmp_path / "run",
        workers=0,
    )
    plain = api.fuse(bundles=bundles, method="average", out=tmp_path / "plain").values["bundle"]
    assert read_bundle(tmp_path / "run")[1].classes == ("new", "other", "third")
    merged, found = (load_file(Path(p) / "model.safetensors") for p in (plain, tmp_path / "run" / "bundle"))
    for name, tensor in merged.items():
        if not name.startswith("classifier.3"):
            assert torch.equal(found[name], tensor), name
    again = api.evaluate(model=tmp_path / "run", data=data, workers=0).values["accuracy"]
    assert outcome.values["accuracy"] == again > 0.45  # three classes, on a backbone that never learned


def test_base__with_other_classes_is_the_origin_of_the_backbone(tmp_path: Path, models: list[Path]) -> None:
    """Task vectors of models whose base answered ImageNet: heads that the base does not know are averaged."""
    base = make_bundle(tmp_path / "base", ("n1", "n2"), name="squeezenet1_1", seed=9)
    api.fuse(bundles=models, base=base, method="task_arithmetic", scale=0.25, out=tmp_path / "run")
    parts = [load_file(read_bundle(p)[0] / "model.safetensors") for p in (base, *models, tmp_path / "run")]
    name = "features.3.squeeze.weight"
    origin, first, second, found = (part[name].double() for part in parts)
    torch.testing.assert_close(found, origin + 0.25 * (first + second - 2 * origin), rtol=1e-5, atol=1e-6)
    head = head_of(tmp_path / "run")
    torch.testing.assert_close(head["d"], (head_of(models[0])["d"] + head_of(models[1])["d"]) / 2)


@pytest.mark.parametrize("method", ["slerp", "multi_slerp", "ties", "dare_ties", "model_stock"])
def test_union__of_every_method_is_finite_and_complete(
    tmp_path: Path, models: list[Path], method: str
) -> None:
    api.fuse(bundles=models, base=models[0], method=method, out=tmp_path / "run")
    found = head_of(tmp_path / "run")
    assert len(found) == 10
    assert torch.equal(found["x"], head_of(models[1])["x"])


def test_plan__names_and_refusals() -> None:
    models = [("runs/a/bundle", FIVE), ("runs/b/bundle", ("a", "b"))]
    plan = plan_classes(models, "merge", "union", None)
    assert plan.classes == FIVE
    assert plan.fates() == {"merged from all models": ["a", "b"], "from model 1 alone": ["c", "d", "e"]}
    assert short_names(["x/a/bundle", "y/a/bundle"]) == ["x-a", "y-a"]
    assert short_names(["same", "same"]) == ["1", "2"]
    with pytest.raises(RecipeError, match="no class is known to all"):
        plan_classes([("a", ("x",)), ("b", ("y",))], "merge", "intersection", None)
    with pytest.raises(RecipeError, match=r"no model knows 1 of the target's classes \(q\).*heads=rebuild"):
        plan_classes(models, "merge", "target", ("a", "q"))
    with pytest.raises(RecipeError, match="heads=rebuild takes the classes of data="):
        plan_classes(models, "rebuild", "union", None)
