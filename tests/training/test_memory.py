"""The memory estimate, against closed forms."""

from __future__ import annotations

import torch
from torch import nn

from tldist.training.memory import estimate_memory

N, D, H, K = 32, 3 * 8 * 8, 50, 7


def network() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(D, H), nn.ReLU(), nn.Linear(H, K))


def test_memory__of_a_perceptron_is_what_its_formulas_say() -> None:
    model = network()
    found = estimate_memory(
        model, model, torch.zeros(1, 3, 8, 8), images=N, optimizer="adamw", averaged=False, autocast=None
    )
    parameters = 4 * (D * H + H + H * K + K)
    assert (found.weights, found.gradients, found.optimizer) == (parameters, parameters, 2 * parameters)
    # The first layer keeps its input for the gradient of its weights; ReLU's output serves ReLU and the next.
    assert found.activations == 4 * N * (D + H)
    assert found.total == 4 * parameters + 4 * N * (D + H)


def test_memory__frozen_layers_keep_nothing_and_an_average_doubles_the_weights() -> None:
    model = network()
    model[1].requires_grad_(False)
    example = torch.zeros(1, 3, 8, 8)
    found = estimate_memory(model, model, example, images=N, optimizer="sgd", averaged=True, autocast=None)
    whole, learning = 4 * (D * H + H + H * K + K), 4 * (H * K + K)
    assert (found.weights, found.gradients, found.optimizer) == (2 * whole, learning, learning)
    assert found.activations == 4 * N * H


def test_memory__bf16_halves_activations_and_shards_divide_the_rest() -> None:
    model = nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(6)])
    example = torch.zeros(1, 4, 16, 16)
    whole, half = (
        estimate_memory(model, model, example, images=8, optimizer="adamw", averaged=False, autocast=dtype)
        for dtype in (None, torch.bfloat16)
    )
    # The input stays float32 in one and is cast in the other; weights are cast too, and kept.
    assert 0.45 < half.activations / whole.activations < 0.75
    shared = estimate_memory(
        model, model, example, images=8, optimizer="adamw", averaged=False, autocast=None, shards=4
    )
    assert shared.optimizer == whole.optimizer // 4
    assert shared.activations == whole.activations
