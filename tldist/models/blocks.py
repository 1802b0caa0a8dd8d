"""Blocks: the ordered parts of a backbone that are frozen, unfrozen and given a learning rate as one."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import nn

from tldist.errors import RecipeError
from tldist.models.heads import find_head

_CONTAINERS = {
    "backbone", "features", "encoder", "layers", "blocks", "stages", "trunk_output", "classifier", "heads",
    "members",
}  # fmt: skip
"""Children whose own children are blocks; the names that torchvision, timm, `Chain` and `Concat` use."""


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

    def touches(self, path: str) -> bool:
        """Whether the module at ``path`` is part of the block, or holds a part of it."""
        return self.owns(path) or any(
            name.startswith(f"{path}.") for name in (*self.parameters, *self.modules)
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


def trainable_blocks(model: nn.Module, blocks: list[Block], train: str) -> list[Block]:
    """The parts that learn.

    Args:
        model: the whole.
        blocks: as cut, the head last.
        train: ``head``, ``last:N`` (the head and the N blocks before it), ``all``, or ``re:PATTERN`` (the
            parameters whose names the regular expression finds, and no others).

    Raises:
        RecipeError: malformed, more blocks than there are, or a pattern that finds nothing.
    """
    if train == "all":
        return blocks
    if train == "head":
        return blocks[-1:]
    kind, _, rest = train.partition(":")
    if kind == "last" and rest.isdecimal():
        if int(rest) >= len(blocks):
            raise RecipeError(
                f"train={train}: the backbone has {len(blocks) - 1} blocks; use train=all to train them all."
            )
        return blocks[-1 - int(rest) :]
    if kind == "re":
        return [_matching(model, rest)]
    raise RecipeError(f"train={train}: expected head, last:N, all or re:PATTERN.")


def _matching(model: nn.Module, pattern: str) -> Block:
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise RecipeError(f"train=re:{pattern}: not a regular expression: {error}.") from error
    found = [name for name, _ in model.named_parameters() if expression.search(name)]
    if not found:
        names = [name for name, _ in model.named_parameters()]
        shown = ", ".join([*names[:3], "...", *names[-2:]])
        raise RecipeError(f"train=re:{pattern}: finds no parameter (there are {shown}).")
    return Block(f"re:{pattern}", [], found)


def freeze(model: nn.Module, learning: list[Block]) -> list[nn.Module]:
    """Freeze every parameter outside ``learning``.

    Returns:
        The frozen modules, to be kept in evaluation mode: their BatchNorm statistics and dropout rest too.
        A composite (stochastic depth, attention dropout) rests when nothing below it learns.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(block.owns(name) for block in learning))
    paths = [path for path, _ in model.named_modules()]
    learns = {path for path in paths if any(block.touches(path) for block in learning)}
    alive = {path for path in paths if any(path == live or live.startswith(f"{path}.") for live in learns)}
    return [module for path, module in model.named_modules() if path and path not in alive]


def frozen_tensors(model: nn.Module, frozen: list[nn.Module]) -> list[str]:
    """Names in the state dict of what may not change: frozen parameters, and buffers of frozen modules."""
    resting = {id(module) for module in frozen}
    parameters = dict(model.named_parameters())
    owners = {
        f"{path}.{name}" if path else name: module
        for path, module in model.named_modules()
        for name, _ in module.named_buffers(recurse=False)
    }
    return [
        name
        for name in model.state_dict()
        if (name in parameters and not parameters[name].requires_grad)
        or (name in owners and id(owners[name]) in resting)
    ]


def training_mode(model: nn.Module, frozen: list[nn.Module]) -> None:
    """Training mode for what learns, evaluation mode for what is frozen."""
    model.train()
    for module in frozen:
        module.training = False
