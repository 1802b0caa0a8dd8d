"""Inner products against explicit patches in float64, and RegMean against least squares on stacked inputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support import make_images
from tests.support_models import SMALL, lively_model
from tests.support_processes import run_ranks
from tldist import distributed
from tldist.data.loader import load_batches
from tldist.domain import open_domain
from tldist.fuse.statistics.gram import Grams, gram_matrices
from tldist.fuse.statistics.walk import Walk
from tldist.fuse.weights.informed import plain_average, regmean
from tldist.models.load import input_tensor
from tldist.training.ledger import Ledger


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), {"a": 4, "b": 3})


def grams(model: nn.Module, folder: Path, batch_size: int = 3, **options: int) -> Grams:
    domain, team = open_domain(folder), distributed.start()
    walk = Walk(batch_size=batch_size, seed=1)
    return gram_matrices(model, SMALL, domain, team, Ledger(domain, None), walk=walk, **options)


def inputs(folder: Path) -> Tensor:
    domain = open_domain(folder)
    return input_tensor(next(load_batches(domain, [np.arange(len(domain))], SMALL)).images, SMALL)


def patches(conv: nn.Conv2d, images: np.ndarray) -> list[np.ndarray]:
    """What each output place reads, one (rows, C / groups * k * k) array a group: by loops over places."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    if conv.padding == "same":
        both = [(dh * (kh - 1) // 2, -(-dh * (kh - 1) // 2)), (dw * (kw - 1) // 2, -(-dw * (kw - 1) // 2))]
    elif conv.padding == "valid":
        both = [(0, 0), (0, 0)]
    else:
        both = [(p, p) for p in conv.padding]
    mode = {"zeros": "constant", "circular": "wrap", "replicate": "edge", "reflect": "reflect"}
    padded = np.pad(images, [(0, 0), (0, 0), *both], mode=mode[conv.padding_mode])
    rows = []
    for y in range(0, padded.shape[2] - dh * (kh - 1), sh):
        for x in range(0, padded.shape[3] - dw * (kw - 1), sw):
            rows.append(padded[:, :, y : y + dh * (kh - 1) + 1 : dh, x : x + dw * (kw - 1) + 1 : dw])
    width = images.shape[1] // conv.groups
    stacked = np.concatenate(rows)
    return [stacked[:, g * width : (g + 1) * width].reshape(len(stacked), -1) for g in range(conv.groups)]


CONVOLUTIONS = {
    "plain": nn.Conv2d(3, 4, 3),
    "strided, padded": nn.Conv2d(3, 4, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(3, 4, 3, dilation=3, padding=2),
    "not square": nn.Conv2d(3, 4, (1, 5), stride=(3, 2), padding=(0, 2), dilation=(1, 2)),
    "one by one": nn.Conv2d(3, 4, 1),
    "one by one, strided, padded": nn.Conv2d(3, 4, 1, stride=(2, 3), padding=(1, 0)),
    "same": nn.Conv2d(3, 4, (4, 3), padding="same"),
    "valid": nn.Conv2d(3, 4, 2, padding="valid"),
    "depthwise": nn.Conv2d(3, 6, 3, groups=3, padding=1),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflected": nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect"),
    "patches of a ViT": nn.Conv2d(3, 5, 8, stride=8),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_grams__of_a_convolution_equal_explicit_patches(images: Path, case: str, batch_size: int) -> None:
    conv = CONVOLUTIONS[case]
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(conv.out_channels, 2))
    found = grams(model, images, batch_size).matrices["0.weight"].numpy()
    rows = patches(conv, inputs(images).double().numpy())
    expected = np.stack([x.T @ x / len(x) for x in rows])
    assert found.shape == (expected.shape if conv.groups > 1 else expected.shape[1:])
    np.testing.assert_allclose(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    # The patches are those that the layer reads, in the order of its weight.
    answer = np.concatenate([x @ w.T for x, w in zip(rows, blocks(conv))], 1) + conv.bias.detach().numpy()
    real = conv(inputs(images)).permute(2, 3, 0, 1).flatten(0, 2).detach().numpy()
    np.testing.assert_allclose(answer, real, rtol=1e-3, atol=1e-4)


def blocks(conv: nn.Conv2d) -> np.ndarray:
    return conv.weight.detach().double().reshape(conv.groups, conv.out_channels // conv.groups, -1).numpy()


def test_grams__patches_beyond_the_memory_at_once(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model("squeezenet1_1", 2)
    whole = grams(model, images, 7).matrices
    monkeypatch.setattr("tldist.fuse.statistics.gram._PATCH_BYTES", 1)
    for name, matrix in grams(model, images, 7).matrices.items():
        torch.testing.assert_close(matrix, whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_tiny"])
def test_grams__of_whole_networks_cover_what_is_called(images: Path, name: str) -> None:
    model = vit_tiny() if name == "vit_tiny" else lively_model(name, 3)
    found = grams(model, images)
    shapes = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    assert set(found.matrices) | set(found.left_out) == set(shapes)
    for weight, matrix in found.matrices.items():
        assert matrix.shape[-2:] == (shapes[weight][0].numel(),) * 2
        torch.testing.assert_close(matrix, matrix.mT, rtol=1e-6, atol=1e-7)
        if matrix.shape[-1] < 300:
            assert torch.linalg.eigvalsh(matrix).min() > -1e-4 * matrix.abs().max()
    if name == "vit_tiny":
        called = {n for n in shapes if "mlp" in n or n.startswith(("conv_proj", "heads"))}
        assert set(found.matrices) == called
        assert (
            "without a call"
            in found.left_out["encoder.layers.encoder_layer_0.self_attention.out_proj.weight"]
        )
        assert "no linear" in found.left_out["encoder.pos_embedding"]
    else:
        assert not found.left_out


def vit_tiny() -> nn.Module:
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight)
    return model.eval()


class Odd(nn.Module):
    """Layers whose weight is not what it seems, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, 8, stride=8)
        self.scaled = _Scaled(4, 4)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight
        self.twice = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        x = self.other(self.one(self.normed(self.scaled(self.wide(images).mean((2, 3))))))
        return self.head(self.twice(input=self.twice(x)))


class _Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


def test_grams__what_is_left_out_is_said_with_its_reason(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    model = Odd()
    found = grams(model, images, largest=150)
    assert set(found.matrices) == {"twice.weight", "head.weight"}
    said = capsys.readouterr().err
    for name, reason in {
        "wide.weight": "more than 150 wide",
        "scaled.weight": "forward of its own",
        "one.weight": "shared",
        "other.weight": "shared",
        "normed.parametrizations.weight.original1": "no linear",
    }.items():
        assert reason in found.left_out[name]
        assert reason in said
    seen: list[Tensor] = []
    model.twice.register_forward_pre_hook(
        lambda _, args, named: seen.append(args[0] if args else named["input"]), with_kwargs=True
    )
    model(inputs(images))
    rows = torch.cat(seen).double()
    torch.testing.assert_close(
        found.matrices["twice.weight"], rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6
    )


def _found(folder: Path, batch_size: int) -> dict[str, np.ndarray]:
    found = grams(lively_model("squeezenet1_1", 3), folder, batch_size)
    return {name: matrix.numpy() for name, matrix in found.matrices.items()}


@pytest.mark.parametrize("batch_size", [2, 64])  # 64: an idle process
def test_grams__processes_do_not_matter(images: Path, batch_size: int) -> None:
    alone = run_ranks(_found, 1, images, batch_size)[0]
    for found in run_ranks(_found, 2, images, batch_size):
        assert set(found) == set(alone)
        for name, matrix in alone.items():
            np.testing.assert_allclose(found[name], matrix, rtol=1e-12, atol=1e-15, err_msg=name)


# -- RegMean ------------------------------------------------------------------------------------------------


def least_squares(xs: list[np.ndarray], weights: list[np.ndarray], shares: tuple[float, ...]) -> np.ndarray:
    """W with least ``sum_i s_i / N_i ||X_i W - X_i W_i||^2``, by lstsq on stacked inputs; (O, D)."""
    factors = [np.sqrt(share / len(x)) for x, share in zip(xs, shares)]
    left = np.concatenate([factor * x for factor, x in zip(factors, xs)])
    right = np.concatenate([factor * x @ w.T for factor, x, w in zip(factors, xs, weights)])
    return np.linalg.lstsq(left, right, rcond=None)[0].T


SHARES = (0.5, 0.2, 0.3)


@pytest.mark.parametrize(("inputs_", "outputs", "rows"), [(5, 3, 40), (1, 4, 3), (17, 1, 60), (8, 30, 9)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_regmean__equals_least_squares(inputs_: int, outputs: int, rows: int, dtype: type) -> None:
    random = np.random.default_rng(inputs_)
    mixing = random.normal(size=(inputs_, inputs_))
    xs = [random.normal(size=(rows + i, inputs_)) @ mixing + i for i in range(3)]
    weights = [random.normal(size=(outputs, inputs_)).astype(dtype) for _ in range(3)]
    found = regmean(weights, [x.T @ x / len(x) for x in xs], SHARES, reduce=1.0)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, least_squares(xs, weights, SHARES), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_regmean__of_a_convolution_equals_least_squares_on_patches(case: str) -> None:
    conv = CONVOLUTIONS[case]
    random = np.random.default_rng(1)
    xs = [patches(conv, random.normal(size=(12, 3, 24, 24)) + i) for i in range(3)]
    weights = [random.normal(size=tuple(conv.weight.shape)) for _ in range(3)]
    flat = [w.reshape(conv.groups, conv.out_channels // conv.groups, -1) for w in weights]
    expected = [least_squares([x[g] for x in xs], [w[g] for w in flat], SHARES) for g in range(conv.groups)]
    matrices = [np.stack([x.T @ x / len(x) for x in of_one]) for of_one in xs]
    matrices = matrices if conv.groups > 1 else [matrix[0] for matrix in matrices]
    found = regmean(weights, matrices, SHARES, reduce=1.0)
    assert found.shape == weights[0].shape
    np.testing.assert_allclose(found, np.stack(expected).reshape(found.shape), rtol=1e-6, atol=1e-8)


def test_regmean__of_a_measured_layer_equals_least_squares_on_its_inputs(images: Path) -> None:
    models = [lively_model("squeezenet1_1", 3, seed) for seed in range(3)]
    path = "features.3.expand3x3"
    xs, weights = [], []
    for model in models:
        conv, seen = model.get_submodule(path), []
        handle = conv.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        model(inputs(images))
        handle.remove()
        xs.append(patches(conv, seen[0].double().numpy())[0])
        weights.append(conv.weight.detach().double().numpy())
    measured = [grams(model, images, 64).matrices[f"{path}.weight"].numpy() for model in models]
    found = regmean(weights, measured, SHARES, reduce=0.5)
    expected = reduced(xs, weights, 0.5)
    np.testing.assert_allclose(found, expected.reshape(found.shape), rtol=1e-3, atol=1e-4)


def reduced(xs: list[np.ndarray], weights: list[np.ndarray], reduce: float) -> np.ndarray:
    """The equations as the paper writes them, solved by LU."""
    left, right = 0.0, 0.0
    for x, w, share in zip(xs, weights, SHARES):
        gram = x.T @ x / len(x)
        gram = reduce * gram + (1 - reduce) * np.diag(np.diag(gram))
        left, right = left + share * gram, right + share * gram @ w.reshape(len(w), -1).T
    return np.linalg.solve(left, right).T


@pytest.mark.parametrize("reduce", [0.0, 0.3, 0.9])
def test_regmean__reduces_what_is_off_the_diagonal(reduce: float) -> None:
    random = np.random.default_rng(4)
    xs = [random.normal(size=(30, 6)) @ random.normal(size=(6, 6)) for _ in range(3)]
    weights = [random.normal(size=(5, 6)) for _ in range(3)]
    found = regmean(weights, [x.T @ x / len(x) for x in xs], SHARES, reduce)
    np.testing.assert_allclose(found, reduced(xs, weights, reduce), rtol=1e-8)


def test_regmean__special_cases() -> None:
    random = np.random.default_rng(5)
    xs = [random.normal(size=(30, 6)) for _ in range(3)]
    matrices = [x.T @ x / len(x) for x in xs]
    weights = [random.normal(size=(5, 6)) for _ in range(3)]
    np.testing.assert_array_equal(regmean([weights[0]] * 3, matrices, SHARES), weights[0])
    np.testing.assert_allclose(
        regmean(weights, [matrices[0]] * 3, SHARES), plain_average(weights, SHARES), rtol=1e-9
    )
    np.testing.assert_allclose(
        regmean(weights, [np.zeros((6, 6)), matrices[1], np.zeros((6, 6))], SHARES), weights[1], rtol=1e-9
    )
    np.testing.assert_array_equal(
        regmean(weights, [np.zeros((6, 6))] * 3, SHARES), plain_average(weights, SHARES)
    )


@pytest.mark.parametrize("reduce", [0.9, 1.0])
def test_regmean__inputs_that_are_always_zero_get_the_plain_average(reduce: float) -> None:
    random = np.random.default_rng(6)
    alive = np.array([0, 2, 3])
    xs = [np.zeros((30, 5)) for _ in range(3)]
    for x in xs:
        x[:, alive] = random.normal(size=(30, 3)) * [1e-4, 1.0, 1e3]  # and inputs of very different size
    weights = [random.normal(size=(4, 5)) for _ in range(3)]
    found = regmean(weights, [x.T @ x / len(x) for x in xs], SHARES, reduce)
    np.testing.assert_allclose(found[:, [1, 4]], plain_average(weights, SHARES)[:, [1, 4]], rtol=1e-12)
    np.testing.assert_allclose(
        found[:, alive],
        regmean(
            [w[:, alive] for w in weights], [x[:, alive].T @ x[:, alive] / 30 for x in xs], SHARES, reduce
        ),
        rtol=1e-9,
    )


@pytest.mark.parametrize("rows", [2, 5])
def test_regmean__fewer_inputs_than_their_width_still_fit_the_outputs(rows: int) -> None:
    """Singular: no worse than any solution on these inputs, and no large numbers where they say nothing."""
    random = np.random.default_rng(7)
    xs = [random.normal(size=(rows, 20)).astype(np.float32) for _ in range(3)]
    weights = [random.normal(size=(4, 20)) for _ in range(3)]
    found = regmean(weights, [x.T @ x / len(x) for x in xs], SHARES, reduce=1.0)
    best = least_squares([x.astype(np.float64) for x in xs], weights, SHARES)

    def error(merged: np.ndarray) -> float:
        return sum(s / rows * ((x @ (merged - w).T) ** 2).sum() for s, x, w in zip(SHARES, xs, weights))

    assert error(found) <= error(best) + 1e-5
    assert np.abs(found - plain_average(weights, SHARES)).max() < 10
