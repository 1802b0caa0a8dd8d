"""`tldist models` and `tldist layers` against torchvision itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchvision import models as torchvision_models

from tests.support_models import make_bundle
from tldist.errors import BundleError, ModelError, RecipeError
from tldist.models.listing import list_layers, list_models
from tldist.models.recipe import LayersRecipe, ModelsRecipe


def names(pattern: str = "*") -> list[str]:
    return [row["name"] for row in list_models(ModelsRecipe(pattern=pattern)).values["models"]]


def layers(model: str | Path) -> dict:
    return list_layers(LayersRecipe(model=str(model))).values


def test_list_models__all_of_torchvisions_classifiers() -> None:
    assert set(names()) == set(torchvision_models.list_models(module=torchvision_models))


def test_list_models__part_of_a_name_and_patterns() -> None:
    assert names("resnet*") == ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert "wide_resnet50_2" in names("resnet")
    assert names("VIT_B_??") == ["vit_b_16", "vit_b_32"]


def test_list_models__sizes_and_weights_are_torchvisions() -> None:
    row = list_models(ModelsRecipe(pattern="resnet50")).values["models"][0]
    assert row["parameters"] == sum(p.numel() for p in torchvision_models.resnet50().parameters())
    assert row["weights"] == ["IMAGENET1K_V1", "IMAGENET1K_V2"]


def test_list_models__nothing_matches_names_the_close_ones() -> None:
    with pytest.raises(RecipeError, match=r"no model matches 'resnt18'. Did you mean: resnet18"):
        names("resnt18")


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "regnet_y_400mf", "vit_b_32", "swin_t"])
def test_list_layers__every_parameter_and_layer_once(name: str) -> None:
    found, model = layers(name), torchvision_models.get_model(name)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert sum(block["parameters"] for block in found["blocks"]) == found["parameters"]
    listed = [layer["name"] for block in found["blocks"] for layer in block["layers"]]
    leaves = [
        path for path, module in model.named_modules() if path and not any(True for _ in module.children())
    ]
    assert sorted(listed) == sorted(leaves)


def test_list_layers__resnet18_by_hand() -> None:
    found = layers("resnet18")
    names_in_order = ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [block["name"] for block in found["blocks"]] == names_in_order
    assert (found["features"], found["outputs"], found["head"]) == (512, 1000, "fc")
    assert [block["train"] for block in found["blocks"]][-2:] == ["last:1", "head"]
    assert found["blocks"][0]["parameters"] == 9408 + 128


def test_list_layers__of_a_bundle(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle", ("a", "b", "c"), name="squeezenet1_1")
    found = layers(bundle)
    assert (found["model"], found["outputs"], found["features"]) == ("squeezenet1_1", 3, 512)


def test_list_layers__refusals(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="Did you mean: resnet18"):
        layers("resnt18")
    with pytest.raises(BundleError, match="not a bundle"):
        layers(tmp_path)
    with pytest.raises(BundleError, match="no such folder"):
        layers(tmp_path / "nowhere")
