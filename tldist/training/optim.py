"""How weights move: optimiser, learning rate as a function of samples seen, state as plain tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer


def build_optimizer(
    model: nn.Module, *, name: str, lr: float, weight_decay: float, momentum: float
) -> Optimizer:
    """AdamW or SGD over what learns; weight decay spares biases and norms (tensors of one dimension)."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learning if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if name == "adamw":
        return AdamW(groups, lr=lr)
    return SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)


def learning_rate(samples: float, total: int, peak: float, warmup: float, schedule: str) -> float:
    """The learning rate after ``samples`` of ``total``.

    A line from 0 to ``peak`` over the share ``warmup``, then half a cosine to 0 (SGDR, arXiv:1608.03983,
    eq. 5, one cycle) or no change. Counted in samples, it is the same for any number of processes.
    """
    done = min(1.0, samples / total)
    if done < warmup:
        return peak * done / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup)))


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as tensors named ``<parameter>|<state>``."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}|{key}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def load_optimizer_tensors(optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put the state of `optimizer_tensors` back, each tensor beside its parameter."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("|")
        parameter = parameters[parameter_name]
        # AdamW keeps its step count on the CPU.
        device = "cpu" if key == "step" else parameter.device
        optimizer.state[parameter][key] = tensor.to(device).clone()
