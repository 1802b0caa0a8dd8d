"""Schedules, groups and penalties, against PyTorch's own and against the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.nets import plain_cnn
from tldist.models.blocks import cut_blocks
from tldist.training.calibrate import calibration_error, fit_temperature
from tldist.training.objective import balanced_weights, cross_entropy
from tldist.training.optim import PullToStart, build_optimizer, layer_scales, learning_rate


def torch_rates(make, steps: int, lr: float) -> list[float]:  # type: ignore[no-untyped-def]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_one_cycle__is_pytorchs() -> None:
    steps, warmup = 100, 0.3
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, max_lr=0.5, total_steps=steps + 1, pct_start=31 / 101, cycle_momentum=False
        ),
        steps,
        0.5,
    )
    # OneCycleLR counts its last step as the end of the warm-up: pct_start * total - 1 = 30 steps here.
    ours = [learning_rate(step, steps, 0.5, warmup, "one_cycle") for step in range(steps)]
    assert ours == pytest.approx(expected, rel=1e-6)


def test_cosine_and_linear__are_pytorchs_after_the_warmup() -> None:
    cosine = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 80), 80, 0.1)
    linear = torch_rates(lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, 80), 80, 0.1)
    for name, expected in (("cosine", cosine), ("linear", linear)):
        ours = [learning_rate(20 + step, 100, 0.1, 0.2, name) for step in range(80)]
        assert ours == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "one_cycle", "constant"])
def test_warmup__ends_at_the_peak_and_the_schedule_is_continuous(schedule: str) -> None:
    rates = [learning_rate(s / 10, 1000, 1.0, 0.1, schedule) for s in range(10001)]
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert int(np.argmax(rates)) == 1000
    assert max(abs(np.diff(rates))) < 2e-3
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.0, abs=1e-4)


def test_layer_decay__each_block_learns_slower_than_the_one_above() -> None:
    model = plain_cnn(3)
    blocks = cut_blocks(model)
    optimizer = build_optimizer(
        model, name="sgd", lr=1.0, weight_decay=0.1, momentum=0.0, scales=layer_scales(model, blocks, 0.5)
    )
    scale = {id(p): group["scale"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert found["6.weight"] == 1.0
    assert found["2.weight"] == found["2.bias"] == 0.5
    assert found["0.weight"] == 0.25


def test_weight_decay__spares_biases_and_norms() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(model, name="adamw", lr=1.0, weight_decay=0.1, momentum=0.0)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decay[id(p)] for name, p in model.named_parameters()} == {
        "0.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0, "3.weight": 0.1, "3.bias": 0.0,
    }  # fmt: skip


def test_l2_sp__is_the_gradient_of_the_penalty() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    start = [p.detach().clone() for p in model.parameters()]
    pull = PullToStart(model, ["weight", "bias"], 0.3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    inputs = torch.randn(5, 4)
    model(inputs).square().mean().backward()
    pull()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    penalty = 0.15 * sum((p - s).square().sum() for p, s in zip(model.parameters(), start))
    (model(inputs).square().mean() + penalty).backward()
    for ours, p in zip(found, model.parameters()):
        assert torch.allclose(ours, p.grad, atol=1e-6)


def test_objective__balanced_classes_weigh_the_same() -> None:
    labels = np.array([0] * 8 + [1] * 2 + [3] * 5)
    weights = balanced_weights(labels, 4)
    totals = np.bincount(labels, weights=weights.numpy()[labels], minlength=4)
    assert totals[[0, 1, 3]] == pytest.approx([5.0, 5.0, 5.0])
    assert weights[2] == 0
    logits = torch.randn(15, 4)
    plain = nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    weighted = cross_entropy(0.0, weights)(logits, torch.from_numpy(labels))
    assert torch.allclose(weighted, plain * weights[labels])
    soft = nn.functional.one_hot(torch.from_numpy(labels), 4).float()
    assert torch.allclose(cross_entropy(0.0, weights)(logits, soft), weighted, atol=1e-6)


@pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
def test_temperature__is_found_again(true_temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    calibrated = torch.randn(20000, 5, generator=generator, dtype=torch.float64) * 2
    labels = torch.distributions.Categorical(logits=calibrated).sample()
    temperature = fit_temperature(calibrated * true_temperature, labels)
    assert temperature == pytest.approx(true_temperature, rel=0.05)
    grid = np.linspace(0.2, 5, 2000)
    losses = [
        float(nn.functional.cross_entropy(calibrated * true_temperature / t, labels)) for t in grid[::20]
    ]
    ours = float(nn.functional.cross_entropy(calibrated * true_temperature / temperature, labels))
    assert ours <= min(losses) + 1e-9
    if true_temperature != 1.0:
        before, after = (
            calibration_error(calibrated * true_temperature, labels, t) for t in (1.0, temperature)
        )
        assert after < before / 3
