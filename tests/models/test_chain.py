"""Chains: transforms from plain data, folded, and exported, against the same computed by NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.support_models import SMALL, make_bundle
from tldist import api
from tldist.align.assemble import assemble
from tldist.bundle import BundleConfig
from tldist.errors import BundleError
from tldist.features.heads import LinearHead
from tldist.features.nearest import NeighbourHead, fit_neighbours
from tldist.models.chain import Chain, fold, folded
from tldist.models.description import with_outputs
from tldist.models.load import input_tensor, load_bundle, save_bundle
from tldist.models.neighbours import Neighbours, build_head
from tldist.models.transforms import Affine, Displace, Kernel, Mlp, Scale, Transform, build_transform
from tldist.runtime.package import Package

WIDTH = 6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(), dtype=torch.float64)


def affine(width: int, out: int) -> Affine:
    return Affine.of(random(out, width), random(out))


def scale(width: int) -> Scale:
    found = Scale(width).double()
    found.weight, found.bias = random(width), random(width + 1)[1:]
    return found


def mlp(width: int, hidden: int, out: int) -> Mlp:
    found = Mlp(width, hidden, out).double()
    found.weight, found.bias = random(out, width), random(out)
    found.inner, found.inner_bias, found.outer = random(hidden, width), random(hidden), random(out, hidden)
    return found


def kernel(width: int, landmarks: int, out: int, far: float = 0.0) -> Kernel:
    found = Kernel.of(random(landmarks, width) + far, 0.1, random(out, landmarks))
    found.bias = random(out)
    return found


def transforms(width: int) -> dict[str, Transform]:
    return {
        "affine": affine(width, 4),
        "scale": scale(width),
        "kernel": kernel(width, 9, 3),
        "mlp": mlp(width, 5, 4),
        "displace": Displace.of(random(7, width), random(7, width) * 3),
    }


def computed(transform: Transform, x: np.ndarray) -> np.ndarray:
    """What a transform's docstring says, by NumPy."""
    part = {name: tensor.double().numpy() for name, tensor in transform.state_dict().items()}
    match transform:
        case Affine():
            return x @ part["weight"].T + part["bias"]
        case Scale():
            return x * part["weight"] + part["bias"]
        case Kernel():
            points = part["landmarks"] / part["scale"] + part["centre"]
            squares = ((x[:, None] - points) ** 2).sum(2)
            return np.exp(-(part["scale"] ** 2) * squares) @ part["weight"].T + part["bias"]
        case Mlp():
            hidden = np.maximum(x @ part["inner"].T + part["inner_bias"], 0)
            return x @ part["weight"].T + part["bias"] + hidden @ part["outer"].T
        case Displace():
            nearest = ((x[:, None] - part["points"] - part["centre"]) ** 2).sum(2).argmin(1)
            return x + part["shifts"][nearest]
    raise AssertionError


@pytest.mark.parametrize("name", transforms(WIDTH))
def test_transform__is_what_it_says_and_comes_back_from_plain_data(name: str, tmp_path: Path) -> None:
    transform, values = transforms(WIDTH)[name], random(20, WIDTH)
    expected = computed(transform, values.numpy())
    np.testing.assert_allclose(transform(values).numpy(), expected, atol=1e-12)
    save_file(transform.state_dict(), tmp_path / "t.safetensors")
    again = build_transform(transform.describe()).double()
    again.load_state_dict(load_file(tmp_path / "t.safetensors"))
    assert torch.equal(again(values), transform(values))
    assert again.describe() == transform.describe()
    assert transform.describe()["in"] == WIDTH
    assert transform.describe()["out"] == expected.shape[1]


def test_build_transform__unknown_type_names_the_known() -> None:
    with pytest.raises(BundleError, match=r"'spline'.*affine, scale, kernel, mlp, displace"):
        build_transform({"type": "spline"})


def test_kernel__far_from_the_origin_loses_nothing_in_float32() -> None:
    exact = kernel(WIDTH, 30, 2, far=1000.0)
    values = random(50, WIDTH) + 1000
    expected = exact(values)
    found = kernel(WIDTH, 30, 2, far=1000.0).float()(values.float()).double()
    rounding = float((values.float().double() - values).abs().max())  # of the features themselves
    assert float((found - expected).abs().max()) < 30 * rounding
    assert rounding < 1e-4


def test_displace__takes_points_to_where_they_were_moved() -> None:
    points, moved = random(10, 3), random(10, 3) + 5
    torch.testing.assert_close(Displace.of(points, moved)(points), moved)


# -- folding -----------------------------------------------------------------------------------------------


def linear(width: int, out: int, bias: bool = True) -> nn.Linear:
    found = nn.Linear(width, out, bias=bias).double()
    with torch.no_grad():
        found.weight.copy_(random(out, width))
    return found


@pytest.mark.parametrize(
    ("parts", "left"),
    [
        ([affine(6, 6)], 0),
        ([scale(6)], 0),
        ([scale(6), scale(6), affine(6, 4), scale(4)], 0),
        ([affine(6, 5), mlp(5, 3, 4), affine(4, 4), scale(4)], 2),
        ([scale(6), kernel(6, 9, 4), scale(4)], 2),
        ([affine(6, 1)], 1),  # apart 6 + 3 multiplications, folded 18
        ([scale(6), affine(6, 1)], 1),
        ([], 0),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_fold__keeps_the_function(parts: list[Transform], left: int, bias: bool) -> None:
    width = parts[-1].describe()["out"] if parts else 6
    head = linear(width, 3, bias)
    kept, found = fold(parts, head)
    assert len(kept) == left
    values = random(8, 6)
    expected, folded_values = values, values
    for part in parts:
        expected = part(expected)
    for part in kept:
        folded_values = part(folded_values)
    torch.testing.assert_close(found(folded_values), head(expected), rtol=1e-10, atol=1e-10)


def test_fold__a_head_of_neighbours_stays() -> None:
    head = Neighbours.of(random(9, 6), torch.arange(9) % 3, 3, 4, 0.07)
    kept, found = fold([scale(6), scale(6)], head)
    assert len(kept) == 1
    assert found is head


# -- heads of neighbours -----------------------------------------------------------------------------------


def votes(stored: np.ndarray, labels: np.ndarray, x: np.ndarray, k: int, temperature: float) -> np.ndarray:
    """The weighted vote, sample by sample."""
    unit = stored / np.linalg.norm(stored, axis=1, keepdims=True)
    rows = []
    for sample in x / np.linalg.norm(x, axis=1, keepdims=True):
        cosines = unit @ sample
        nearest = np.argsort(-cosines)[:k]
        weights = np.exp(cosines[nearest] / temperature)
        rows.append([weights[labels[nearest] == c].sum() / weights.sum() for c in range(labels.max() + 1)])
    return np.array(rows)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (5, 0.07), (5, 10.0), (20, 0.5), (99, 0.5)])
def test_neighbours__is_the_weighted_vote(k: int, temperature: float) -> None:
    stored, labels, values = random(20, 4), torch.arange(20) % 3, random(30, 4) + 0.3
    head = Neighbours.of(stored, labels, 3, k, temperature)
    expected = votes(stored.numpy(), labels.numpy(), values.numpy(), min(k, 20), temperature)
    np.testing.assert_allclose(head(values).exp().detach().numpy(), 0.99 * expected + 0.01 / 3, atol=1e-12)
    again = build_head(head.describe()).double()
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(values), head(values))
    assert again.out_features == 3


def test_with_outputs__neighbours_become_a_linear_head() -> None:
    head = {"type": "neighbours", "in": 4, "out": 3, "samples": 9, "k": 2, "temperature": 0.1}
    described = {"type": "chain", "backbone": {}, "transforms": [], "head": head}
    assert with_outputs(described, 7)["head"] == {"type": "linear", "in": 4, "out": 7}


# -- bundles and graphs ------------------------------------------------------------------------------------

CLASSES = ("a", "b", "c")


def heads(width: int) -> dict[str, LinearHead | NeighbourHead]:
    return {
        "linear": LinearHead(random(3, width), random(3), 0.1, True),
        "neighbours": fit_neighbours(random(40, width), torch.arange(40) % 3, 3, k=5),
    }


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("model") / "bundle", CLASSES, name="tests.nets:plain_cnn")


IMAGES = np.random.default_rng(3).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
FEATURES = 64


def save_chain(bundle: Path, parts: list[Transform], head: LinearHead | NeighbourHead, path: Path) -> Chain:
    """Align again and again: each transform after those that are there."""
    model, config = load_bundle(bundle, trust_code=True)
    description = config.model
    for part in parts:
        fitted = head if part is parts[-1] else heads(part.describe()["out"])["linear"]
        model, description = assemble(model, description, part, fitted, trust_code=True)
    save_bundle(path, model, BundleConfig(description, CLASSES, SMALL))
    return load_bundle(path, trust_code=True)[0]


CHAINS = {
    "folds": ([scale(FEATURES), affine(FEATURES, 7)], "linear", "logits", 0),
    "curved": (
        [mlp(FEATURES, 5, 8), *(transforms(8)[n] for n in ("displace", "kernel"))],
        "neighbours",
        "logits",
        3,
    ),
    "features": ([scale(FEATURES)], "linear", "both", 1),
}
"""Transforms, head, what is exported, and how many transforms are left in the graph."""


@pytest.mark.parametrize("name", CHAINS)
def test_export__graph_and_bundle_give_what_the_parts_say(tmp_path: Path, bundle: Path, name: str) -> None:
    parts, head, output, left = CHAINS[name]
    fitted = heads(parts[-1].describe()["out"])[head]
    chain = save_chain(bundle, parts, fitted, tmp_path / "bundle")
    images = input_tensor(torch.from_numpy(IMAGES), SMALL)
    with torch.no_grad():
        values, logits = chain.backbone(images).double().numpy(), chain(images).numpy()
    for part in parts:
        values = computed(part, values)
    expected = fitted.logits(torch.from_numpy(values)).numpy()
    assert np.ptp(expected, axis=0).max() > 1e-2  # the transforms let something through
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())

    api.export(
        bundle=str(tmp_path / "bundle"), out=tmp_path / "out", output=output, samples=2, trust_code=True
    )
    found = Package.open(tmp_path / "out", threads=1).run(IMAGES)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-5 * np.abs(expected).max())
    if output == "both":  # features are those of the common space
        np.testing.assert_allclose(found["features"], values, atol=1e-5 * np.abs(values).max())
    names = {tensor.name for tensor in onnx.load(tmp_path / "out" / "model.onnx").graph.initializer}
    assert len({name.split(".")[2] for name in names if ".transforms." in name}) == left


def test_folded__shares_the_backbone_and_leaves_the_chain_as_it_was(tmp_path: Path, bundle: Path) -> None:
    chain = save_chain(bundle, [affine(FEATURES, 8)], heads(8)["linear"], tmp_path / "bundle")
    other = folded(chain)
    assert other.backbone is chain.backbone
    assert (len(other.transforms), len(chain.transforms)) == (0, 1)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(other(images), chain(images), rtol=1e-5, atol=1e-5)
