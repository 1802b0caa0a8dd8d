"""How weights move: optimiser, learning rate as a function of samples seen, state as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from tldist.distributed import spread_like
from tldist.models.blocks import Block


def build_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    scales: Mapping[str, float] | None = None,
    undecayed: frozenset[str] = frozenset(),
    decays: Mapping[str, float] | None = None,
    fused: bool = True,
    auxiliary: nn.Module | None = None,
) -> Optimizer:
    """AdamW or SGD over what learns.

    Args:
        model: its parameters with gradients learn.
        name, lr, weight_decay, momentum: of the optimiser; decay spares biases and norms (one dimension).
        scales: multiple of the learning rate by parameter name, 1 where it is not named; each group carries
            its own as ``scale``.
        undecayed: names that are not decayed either.
        decays: weight decay by parameter name, ``weight_decay`` where it is not named.
        fused: step all parameters in one kernel; PyTorch's SGD cannot where they are spread over processes.
        auxiliary: what learns beside the model.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter_name, parameter in named_parameters(model, auxiliary).items():
        if parameter.requires_grad:
            decay = (decays or {}).get(parameter_name, weight_decay)
            spared = parameter.dim() <= 1 or parameter_name in undecayed
            key = ((scales or {}).get(parameter_name, 1.0), 0.0 if spared else decay)
            groups.setdefault(key, []).append(parameter)
    listed: list[dict[str, Any]] = [
        {"params": parameters, "scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]
    if name == "adamw":
        return AdamW(listed, lr=lr, fused=fused)
    return SGD(listed, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused)


def layer_scales(model: nn.Module, blocks: list[Block], decay: float) -> dict[str, float]:
    """Layer-wise decay: the head at 1, each block below at ``decay`` times the one above it."""
    return {
        name: decay ** (len(blocks) - 1 - depth)
        for name, _ in model.named_parameters()
        for depth, block in enumerate(blocks)
        if block.owns(name)
    }


def learning_rate(samples: float, total: int, peak: float, warmup: float, schedule: str) -> float:
    """The learning rate after ``samples`` of ``total``.

    A line from 0 to ``peak`` over the share ``warmup``, then half a cosine to 0 (SGDR, arXiv:1608.03983,
    eq. 5, one cycle), a line to 0, or no change; ``one_cycle`` rises along a cosine from ``peak / 25`` and
    falls along one to ``peak / 25e4``. Counted in samples, it is the same for any number of processes.
    """
    done = min(1.0, samples / total)
    left = (done - warmup) / (1 - warmup)
    if schedule == "one_cycle":
        if done < warmup:
            return _cosine(peak / 25, peak, done / warmup)
        return _cosine(peak, peak / 25e4, left)
    if done < warmup:
        return peak * done / warmup
    if schedule == "constant":
        return peak
    return peak * (1 - left) if schedule == "linear" else _cosine(peak, 0.0, left)


def _cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from ``start`` to ``end``."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * share))


class PullToStart:
    """L2-SP (arXiv:1802.01483, eq. 3): the gradient of ``strength / 2 * ||w - w_start||^2``.

    Args:
        model: as it starts.
        names: parameters that are pulled: the pre-trained ones.
        strength: the paper's alpha.
    """

    def __init__(self, model: nn.Module, names: list[str], strength: float) -> None:
        parameters = dict(model.named_parameters())
        self.strength = strength
        self.pairs = [(parameters[name], parameters[name].detach().clone()) for name in names]

    @torch.no_grad()
    def __call__(self) -> None:
        """Add it to the gradients, after the backward pass."""
        for parameter, start in self.pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.strength)


def named_parameters(model: nn.Module, auxiliary: nn.Module | None) -> dict[str, nn.Parameter]:
    """The parameters of a model by name, and of what learns beside it as ``auxiliary:<name>``."""
    beside = {} if auxiliary is None else dict(auxiliary.named_parameters())
    return {**dict(model.named_parameters()), **{f"auxiliary:{name}": p for name, p in beside.items()}}


def optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, auxiliary: nn.Module | None = None
) -> dict[str, Tensor]:
    """The optimiser's state as tensors named ``<parameter>|<state>``."""
    names: dict[Tensor, str] = {p: name for name, p in named_parameters(model, auxiliary).items()}
    return {
        f"{names[parameter]}|{key}": value if isinstance(value, Tensor) else torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: Optimizer, model: nn.Module, tensors: dict[str, Tensor], auxiliary: nn.Module | None = None
) -> None:
    """Put the state of `optimizer_tensors` back, each tensor beside its parameter, and spread as that is."""
    parameters = named_parameters(model, auxiliary)
    for name, tensor in tensors.items():
        parameter_name, _, key = name.rpartition("|")
        parameter = parameters[parameter_name]
        optimizer.state[parameter][key] = spread_like(tensor.to(parameter.device).clone(), parameter)
