"""Models aligned to the first: what comes out, what is noted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.support import make_images
from tests.support_models import SMALL
from tests.support_rebasin import answers, build, difference, restless, shuffled
from tldist import distributed
from tldist.domain import open_domain
from tldist.errors import ModelError, RecipeError
from tldist.fuse.rebasin import align
from tldist.fuse.rebasin.align import Aligned, RebasinSettings, align_to_first
from tldist.fuse.rebasin.spec import Group, Place, Spec, permute
from tldist.fuse.rebasin.trace import find_groups

LABELS = ("first", "second", "third")


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def aligned(parents: list[dict[str, Tensor]], name: str, **options: object) -> Aligned:
    settings = RebasinSettings(match=options.pop("match", "weights"), batch_size=8)  # type: ignore[arg-type]
    labels = LABELS[: len(parents)]
    return align_to_first(parents, labels, build(name), SMALL, distributed.start(), settings, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("match", ["weights", "activations"])
def test_align_to_first__three_models(match: str, tmp_path: Path) -> None:
    data = open_domain(make_images(tmp_path / "images", {"a": 12, "b": 12}))
    model = restless(build("resnet18")).float()
    spec, first = find_groups(model, (32, 32)), state(model)
    second = permute(first, spec, shuffled(spec, 1))
    third = state(restless(build("resnet18"), seed=1).float())
    found = aligned([first, second, third], "resnet18", match=match, domain=data)
    assert all(torch.equal(found.tensors[0][name], first[name]) for name in first)
    assert all(torch.equal(found.tensors[1][name], first[name]) for name in first)
    double = build("resnet18").double().eval()
    wide = [
        {k: v.double() if v.is_floating_point() else v for k, v in t.items()}
        for t in (third, found.tensors[2])
    ]
    assert difference(*(answers(double, tensors) for tensors in wide)) < 1e-10
    assert not torch.equal(found.tensors[2]["conv1.weight"], third["conv1.weight"])
    notes = json.loads(json.dumps(found.notes))
    assert (notes["match"], notes["groups"]) == (match, 12)
    assert notes["units"] == sum(group.size for group in spec.groups)
    assert notes["share"] > 0.99
    permuted, other = notes["models"]
    assert [permuted["label"], other["label"]] == ["second", "third"]
    assert permuted["similarity_before"] < 0.9
    assert permuted["similarity_after"] == pytest.approx(1)
    assert 0 < other["moved"] <= notes["units"]
    assert other["similarity_after"] > other["similarity_before"]


def test_align_to_first__keeps_types_and_the_file_tensors() -> None:
    first, second = (
        {k: v.half() if v.is_floating_point() else v for k, v in state(build("squeezenet1_1")).items()}
        for _ in range(2)
    )
    copies = {name: tensor.clone() for name, tensor in second.items()}
    found = aligned([first, second], "squeezenet1_1")
    assert all(tensor.dtype == second[name].dtype for name, tensor in found.tensors[1].items())
    assert all(torch.equal(second[name], copies[name]) for name in second)


def test_align_to_first__activations_need_images() -> None:
    first = state(build("squeezenet1_1"))
    with pytest.raises(RecipeError, match=r"match=activations needs data="):
        aligned([first, first], "squeezenet1_1", match="activations")


def test_align_to_first__other_tensors_are_refused() -> None:
    first = state(build("squeezenet1_1"))
    second = {name: tensor for name, tensor in first.items() if "features.3" not in name}
    with pytest.raises(ModelError, match=r"second and SqueezeNet do not hold the same tensors: features\.3"):
        aligned([first, second], "squeezenet1_1")


def test_align_to_first__tensors_that_are_not_finite_are_refused() -> None:
    first, second = (state(build("squeezenet1_1")) for _ in range(2))
    second["features.3.squeeze.bias"][2] = torch.nan
    with pytest.raises(ModelError, match=r"second cannot be aligned: its tensor features\.3\.squeeze\.bias"):
        aligned([first, second], "squeezenet1_1")


def test_align_to_first__activations_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    data = open_domain(make_images(tmp_path / "images", {"a": 4, "b": 4}))
    first, second = (state(build("squeezenet1_1")) for _ in range(2))
    second["features.3.squeeze.weight"] *= 1e38
    with pytest.raises(ModelError, match=r"the activations of features\.\S+ hold NaN or infinity"):
        aligned([first, second], "squeezenet1_1", match="activations", domain=data)


def test_align_to_first__a_partial_alignment_is_said_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    parents = [state(build("shufflenet_v2_x0_5")) for _ in range(2)]
    found = aligned(parents, "shufflenet_v2_x0_5")
    assert "only 50% of the network can be aligned" in capsys.readouterr().err
    assert found.notes["share"] == pytest.approx(0.5, abs=0.05)


def test_align_to_first__groups_that_are_wrong_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups of another network stand for one that does what its graph does not show."""
    wrong = Spec((Group("conv1", 64, (Place("conv1.weight", 0),)),))
    monkeypatch.setattr(align, "find_groups", lambda model, size: wrong)
    parents = [state(restless(build("resnet18"), seed).float()) for seed in (0, 1)]
    with pytest.raises(ModelError, match=r"second cannot be aligned: ResNet computes something else"):
        aligned(parents, "resnet18")
