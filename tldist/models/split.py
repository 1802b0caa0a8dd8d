"""Cut a model in two where the frozen part ends: a prefix that never changes, a suffix that learns."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from tldist.models.blocks import Block


class CannotSplit(ValueError):
    """The model has no single tensor at which its frozen part ends; the message says why."""


class _BlockTracer(fx.Tracer):
    """Traces the outermost forward only: the modules of blocks are opaque."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)


def split_model(model: nn.Module, blocks: list[Block], learning: list[Block]) -> tuple[nn.Module, nn.Module]:
    """Cut at the one tensor that crosses from the frozen blocks to those that learn.

    Args:
        model: the whole; both parts share its modules and parameters.
        blocks: of the model, as cut.
        learning: the last of them.

    Returns:
        (prefix, suffix): ``suffix(prefix(x))`` equals ``model(x)``.

    Raises:
        CannotSplit: nothing is frozen, the forward cannot be traced, or several tensors cross.
    """
    if len(learning) == len(blocks):
        raise CannotSplit("nothing is frozen")
    try:
        graph = _BlockTracer({path for block in blocks for path in block.modules}).trace(model)
    except Exception as error:  # tracing runs the model's own forward
        raise CannotSplit(f"its forward cannot be traced ({type(error).__name__})") from error
    moving = _depends_on(graph, learning)
    crossing = {source for node in moving for source in node.all_input_nodes if source not in moving}
    if len(crossing) != 1:
        raise CannotSplit(f"{len(crossing)} tensors cross from the frozen part to the part that learns")
    (cut,) = crossing
    if cut.op == "placeholder":
        raise CannotSplit("the part that learns reads the images themselves")
    return _prefix(model, graph, cut), _suffix(model, graph, cut, moving)


def _depends_on(graph: fx.Graph, learning: list[Block]) -> set[fx.Node]:
    """The nodes that belong to, or come after, the blocks that learn."""
    moving: set[fx.Node] = set()
    for node in graph.nodes:
        named = node.op in ("call_module", "get_attr")
        owned = named and any(block.touches(str(node.target)) for block in learning)
        if owned or node.op == "output" or any(source in moving for source in node.all_input_nodes):
            moving.add(node)
    return moving


def _prefix(model: nn.Module, graph: fx.Graph, cut: fx.Node) -> nn.Module:
    needed, unseen = {cut}, [cut]
    while unseen:
        sources = [source for source in unseen.pop().all_input_nodes if source not in needed]
        needed.update(sources)
        unseen += sources
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in needed or node.op == "placeholder":
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(copies[cut])
    return fx.GraphModule(model, part, "Prefix")


def _suffix(model: nn.Module, graph: fx.Graph, cut: fx.Node, moving: set[fx.Node]) -> nn.Module:
    part = fx.Graph()
    copies: dict[fx.Node, Any] = {cut: part.placeholder("features")}
    for node in graph.nodes:
        if node in moving:
            copies[node] = part.node_copy(node, copies.__getitem__)
    return fx.GraphModule(model, part, "Suffix")
