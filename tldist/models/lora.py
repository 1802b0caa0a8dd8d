"""LoRA (arXiv:2106.09685) by the extra ``peft``: small matrices learn beside frozen layers, then merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tldist.errors import ModelError, RecipeError, needs
from tldist.models.blocks import Block

LARGEST_MERGE_DIFFERENCE = 1e-3
"""Of the outputs with and without merging, relative to the largest output; float32 gives about 1e-6."""

_PARTS = ("lora_A", "lora_B", "lora_dropout")


@dataclass(frozen=True)
class Adapters:
    """The adapters of a model.

    Attributes:
        tuner: PEFT's handle on them.
        layers: paths of the adapted layers.
        bypassed: paths of layers that the model reads without calling them: an adapter would learn nothing.
        grouped: paths of grouped convolutions, whose adapters PEFT cannot merge.
        rank: of each.
    """

    tuner: Any
    layers: tuple[str, ...]
    bypassed: tuple[str, ...]
    grouped: tuple[str, ...]
    rank: int

    def beside(self, learning: list[Block], head: Block) -> list[Block]:
        """What learns where ``learning`` would: the adapters in it, and the whole head."""
        layers = _inside(learning, self.layers)
        adapted = [
            path
            for path, module in self.tuner.model.named_modules()
            if hasattr(module, _PARTS[0])
            and any(path == layer or path.startswith(f"{layer}.") for layer in layers)
        ]
        parts = [f"{path}.{part}" for path in adapted for part in _PARTS]
        return [Block("lora", parts), head] if parts else [head]

    @torch.no_grad()
    def merge(self, inputs: Tensor) -> dict[str, Any]:
        """Add the products to the frozen weights and take the adapters off: a plain model again.

        Args:
            inputs: of the model, to measure that its function is the same.

        Returns:
            What was merged, and the largest difference of the outputs, relative to the largest output.

        Raises:
            ModelError: the outputs differ.
        """
        model = self.tuner.model.eval()
        before = model(inputs).double()
        self.tuner.merge_and_unload(safe_merge=True)
        after = model.eval()(inputs).double()
        difference = float((after - before).abs().max() / before.abs().max().clamp(min=1e-12))
        if not difference < LARGEST_MERGE_DIFFERENCE:
            raise ModelError(
                f"merging the LoRA adapters changes the outputs by {difference:.1e} of the largest: "
                f"a weight is shared between layers, or not finite."
            )
        return {"layers": len(self.layers), "rank": self.rank, "merge_difference": difference}


def add_lora(
    model: nn.Module,
    learning: list[Block],
    head: Block,
    size: tuple[int, int],
    *,
    rank: int,
    alpha: float,
    dropout: float,
) -> Adapters:
    """Put adapters beside the linear, attention and convolution layers of the blocks that would learn.

    The model's outputs do not change: the second matrix starts at zero.

    Args:
        model: changed in place.
        learning: the blocks that would learn without LoRA.
        head: learns as it is.
        size: height and width of the input, for one forward pass that finds which layers are called.
        rank: of the product.
        alpha: it is scaled by ``alpha / rank``.
        dropout: of the adapters' input.

    Raises:
        MissingExtra: PEFT is not installed.
        RecipeError: there is no layer to adapt.
    """
    with needs("peft"):
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)) and not head.owns(path)
    }
    attention = [path for path, module in layers.items() if isinstance(module, nn.MultiheadAttention)]
    wanted = [
        path
        for path in _inside(learning, tuple(layers))
        if not any(path.startswith(f"{outer}.") for outer in attention)  # PEFT adapts an attention as a whole
    ]
    called = _called(model, wanted, size)
    grouped = [path for path in wanted if getattr(layers[path], "groups", 1) > 1]
    able = [path for path in wanted if path in called and path not in grouped]
    if not able:
        raise RecipeError(
            f"lora.rank={rank}: what train= selects has no linear, attention or plain convolution layer to "
            f"adapt besides the head. Use train=last:N or train=all."
        )
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=able, bias="none")  # type: ignore[arg-type]
    tuner = LoraModel(model, config, "default")
    bypassed = tuple(path for path in wanted if path not in called)
    return Adapters(tuner, tuple(able), bypassed, tuple(grouped), rank)


def _inside(learning: list[Block], paths: tuple[str, ...]) -> list[str]:
    """Those of the layers at ``paths`` whose weights are part of the blocks."""
    names = ("weight", "in_proj_weight")
    return [p for p in paths if any(block.owns(f"{p}.{name}") for block in learning for name in names)]


@torch.no_grad()
def _called(model: nn.Module, paths: list[str], size: tuple[int, int]) -> set[str]:
    """Which modules a forward pass calls; some attention layers read their projections' weights instead."""
    seen: set[str] = set()
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: seen.add(path))
        for path in paths
    ]
    weight = next(model.parameters())
    try:
        model.eval()(torch.zeros(1, 3, *size, device=weight.device, dtype=weight.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return seen
