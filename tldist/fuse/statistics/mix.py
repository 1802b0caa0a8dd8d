"""A base and what models add to it, mixed by coefficients that can be learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Mix:
    """``base + sum_m coefficients[m, l] * (model_m - base)`` for each parameter l.

    Args:
        model: of the architecture: names and types of its parameters.
        base, models: the parameters by these names.
        device: where they are kept, all at once.
        scale: where every coefficient starts.
        by_tensor: a coefficient for each model and tensor; else one for each model.

    Attributes:
        coefficients: float64 (models, tensors), or (models, 1), on the CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        base: Mapping[str, Tensor],
        models: Sequence[Mapping[str, Tensor]],
        device: torch.device,
        *,
        scale: float,
        by_tensor: bool,
    ) -> None:
        parameters = dict(model.named_parameters())
        self.names = list(parameters)
        # One tensor may have several names.
        first = {id(p): name for name, p in parameters.items()}
        self.all_names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        dtypes = {name: p.dtype for name, p in parameters.items()}
        self.base = {name: base[name].to(device, dtypes[name]) for name in self.names}
        self.deltas = {
            name: [(other[name].double() - base[name].double()).to(device, dtypes[name]) for other in models]
            for name in self.names
        }
        width = len(self.names) if by_tensor else 1
        start = torch.full((len(models), width), scale, dtype=torch.float64)
        self.coefficients = nn.Parameter(start)

    def merged(self) -> dict[str, Tensor]:
        """The merged parameters, as leaves that take a gradient."""
        columns = self._columns(self.coefficients.detach())
        return {
            name: sum(
                (delta * number for delta, number in zip(self.deltas[name], column)), start=self.base[name]
            ).requires_grad_()
            for name, column in zip(self.names, columns)
        }

    def chain(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """The gradient of the coefficients, float64 as they are, from that of the merged parameters:
        ``d / d lambda[m, l] = <d / d merged_l, theta_m,l - base_l>``."""
        columns = [
            torch.stack([(gradient * delta).sum(dtype=torch.float64) for delta in self.deltas[name]])
            if gradient is not None
            else self.base[name].new_zeros(len(self.deltas[name]), dtype=torch.float64)
            for name, gradient in zip(self.names, gradients)
        ]
        table = torch.stack(columns, 1).cpu()
        return table if self.coefficients.shape[1] > 1 else table.sum(1, keepdim=True)

    def named(self, coefficients: Tensor) -> dict[str, tuple[float, ...]]:
        """Name of a parameter to one number a model."""
        found = {name: tuple(column) for name, column in zip(self.names, self._columns(coefficients))}
        return {name: found[first] for name, first in self.all_names.items()}

    def _columns(self, coefficients: Tensor) -> list[list[float]]:
        columns: list[list[float]] = coefficients.expand(-1, len(self.names)).T.tolist()
        return columns
