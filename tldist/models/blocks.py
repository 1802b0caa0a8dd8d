"""Blocks: the ordered parts of a backbone that are frozen, unfrozen and given a learning rate as one."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from tldist.errors import RecipeError
from tldist.models.heads import find_head

_CONTAINERS = {
    "backbone", "features", "encoder", "layers", "blocks", "stages", "trunk_output", "classifier", "heads",
}  # fmt: skip
"""Children whose own children are blocks; the names that torchvision, timm and `Chain` use."""


@dataclass
class Block:
    """One part of a model.

    Attributes:
        name: dotted path of the module that opens it.
        modules: paths of the modules in it, each with all that is below it.
        parameters: names of parameters that lie directly in a container (a ViT's class token).
    """

    name: str
    modules: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    def owns(self, name: str) -> bool:
        """Whether a parameter, buffer or module with this dotted name is part of the block."""
        return name in self.parameters or any(
            name == module or name.startswith(f"{module}.") for module in self.modules
        )


def cut_blocks(model: nn.Module) -> list[Block]:
    """Cut a model into ordered blocks; the last one is the head.

    A child with children of its own opens a block, and so does a lone layer with a weight matrix or kernel;
    norms, activations, pooling and dropout belong to the block before them. Containers (``features``,
    ``layers``, ...) are looked into.
    """
    head_path, _ = find_head(model)
    blocks: list[Block] = []
    loose: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, _ in module.named_parameters(recurse=False):
            loose.append(f"{prefix}{name}")
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path == head_path:
                blocks.append(Block(path, [path]))
            elif name in _CONTAINERS or head_path.startswith(f"{path}."):
                visit(child, f"{path}.")
            elif not blocks or _opens_block(child):
                blocks.append(Block(path, [path]))
            else:
                blocks[-1].modules.append(path)

    visit(model, "")
    if blocks:
        blocks[0].parameters += loose
    head = next(block for block in blocks if block.name == head_path)
    return [block for block in blocks if block is not head] + [head]


def _opens_block(module: nn.Module) -> bool:
    """Whether a child starts a block rather than belonging to the one before it."""
    if any(True for _ in module.children()):
        return any(True for _ in module.parameters())
    weight = getattr(module, "weight", None)
    return weight is not None and weight.dim() >= 2


def trainable_blocks(blocks: list[Block], train: str) -> list[Block]:
    """The blocks that learn.

    Args:
        blocks: as cut, the head last.
        train: ``head``, ``last:N`` (the head and the N blocks before it) or ``all``.

    Raises:
        RecipeError: malformed, or more blocks than there are.
    """
    if train == "all":
        return blocks
    if train == "head":
        return blocks[-1:]
    kind, _, number = train.partition(":")
    if kind == "last" and number.isdecimal():
        if int(number) >= len(blocks):
            raise RecipeError(
                f"train={train}: the backbone has {len(blocks) - 1} blocks; use train=all to train them all."
            )
        return blocks[-1 - int(number) :]
    raise RecipeError(f"train={train}: expected head, last:N or all.")


def freeze(model: nn.Module, learning: list[Block]) -> list[nn.Module]:
    """Freeze every parameter outside ``learning``.

    Returns:
        The frozen modules, to be kept in evaluation mode: their BatchNorm statistics and dropout rest too.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(block.owns(name) for block in learning))
    leaves = [(path, module) for path, module in model.named_modules() if not any(module.children())]
    containers = [(path, module) for path, module in model.named_modules() if any(module.children())]
    frozen = [m for path, m in leaves if not any(block.owns(path) for block in learning)]
    # A composite with behaviour of its own in training mode (stochastic depth, attention dropout) rests
    # when nothing below it learns.
    frozen += [
        m
        for path, m in containers
        if path
        and not any(block.owns(f"{path}.{n}") for block in learning for n, _ in m.named_modules() if n)
    ]
    return frozen


def training_mode(model: nn.Module, frozen: list[nn.Module]) -> None:
    """Training mode for what learns, evaluation mode for what is frozen."""
    model.train()
    for module in frozen:
        module.training = False
