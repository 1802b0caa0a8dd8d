"""The permutation groups of a network, found by following its graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from tldist.errors import ModelError
from tldist.fuse.rebasin.axes import axis_length
from tldist.fuse.rebasin.layers import LAYERS
from tldist.fuse.rebasin.network import Axes, Call, Network, NotUnderstood, Signal, shape_of
from tldist.fuse.rebasin.operations import FUNCTIONS, METHODS
from tldist.fuse.rebasin.spec import Spec
from tldist.models.heads import pool

FAMILIES = (
    "alexnet", "convnext", "densenet", "efficientnet", "googlenet", "inception", "mnasnet", "mobilenet",
    "regnet", "resnet", "resnext", "shufflenet", "squeezenet", "vgg", "vit",
)  # fmt: skip
"""Families of torchvision whose groups are tested."""

_BATCH = 2
_DESCRIBES = {getattr, "size", "dim", "numel"}


def find_groups(model: nn.Module, image_size: tuple[int, int]) -> Spec:
    """Find what may be permuted in a network without a change of what it computes.

    The graph is followed from the images on, and the axes of all tensors that must have one order are joined
    (residual sums, normalisations, depthwise convolutions, squeeze-excitation). The images and the outputs
    keep their order, and so does all that goes into, or comes out of, what is not understood. What the
    network does not run in evaluation mode, as auxiliary heads, stays as it is.

    Args:
        model: is put into evaluation mode; it runs once, on two images.
        image_size: (height, width) that it takes.

    Raises:
        ModelError: its forward cannot be traced or run, or nothing in it can be permuted.
    """
    name = type(model).__name__
    images = torch.zeros(_BATCH, 3, *image_size)
    weight = next(model.parameters(), None)
    if weight is not None:
        images = images.to(weight)
    try:
        graph = fx.GraphModule(model.eval(), fx.Tracer(autowrap_functions=(pool,)).trace(model))
        walk = _Walk(graph, model)
        with torch.no_grad():
            walk.run(images)
    except Exception as error:  # tracing runs the model's own forward
        raise ModelError(
            f"{name} cannot be aligned: its forward cannot be followed on two images of "
            f"{image_size[0]}x{image_size[1]} ({_first_line(error)}). {_remedy()}"
        ) from error
    spec = walk.network.spec()
    if not spec.groups:
        raise ModelError(f"{name} cannot be aligned: nothing in it can be permuted. {_remedy()}")
    return spec


def _remedy() -> str:
    return (
        f"Models of these families can be: {', '.join(FAMILIES)}. Others can be fused where they were "
        f"fine-tuned from one model."
    )


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


class _Walk(fx.Interpreter):
    """Runs a graph, for the shapes, and asks the rule of each node what it does to the axes."""

    def __init__(self, graph: fx.GraphModule, model: nn.Module) -> None:
        super().__init__(graph)
        self.model, self.network = model, Network(model)
        self.known: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """One node: its result is the interpreter's, what is known of it is kept aside."""
        result = super().run_node(n)
        self.known[n] = self._follow(n, result)
        return result

    def _follow(self, node: fx.Node, result: Any) -> Any:
        """`Signal` in the place of each tensor of a result."""
        if node.op == "placeholder":
            return _signals(result, None)
        if node.op == "get_attr":
            name = str(node.target)
            own = self.network.tensor(name) if self.network.may_move(name) else None
            return own or _signals(result, None)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.known.__getitem__)
        call = Call(tuple(args), dict(kwargs), shape_of(result) if isinstance(result, Tensor) else ())
        if node.target in _DESCRIBES and not _holds_tensor(result):
            return result
        if node.op == "call_function" and node.target is operator.getitem and isinstance(call.args[0], tuple):
            return call.args[0][call.args[1]]  # one of several results
        if node.op == "call_module":
            module = self.model.get_submodule(str(node.target))
            call = Call(call.args, call.kwargs, call.shape, module, str(node.target))
        axes = self._axes(node, call, result) if call.signals or call.module else None
        return _signals(result, axes)

    def _axes(self, node: fx.Node, call: Call, result: Any) -> Any:
        """What the rule of a node says; None, with all that goes in pinned, where there is no answer."""
        try:
            axes = self._rule(node, call)(self.network, call)
            if isinstance(result, Tensor):
                _check(axes, call.shape)
            return axes
        except NotUnderstood:
            self.network.pin_all(call.signals)
            if call.module is not None:
                self.network.pin_module(call.path)
            return None

    def _rule(self, node: fx.Node, call: Call) -> Any:
        tables: dict[str, tuple[Any, Any]] = {
            "call_module": (LAYERS, type(call.module)),
            "call_function": (FUNCTIONS, node.target),
            "call_method": (METHODS, node.target),
        }
        table, key = tables.get(node.op, ({}, None))
        if key not in table or not call.signals or _is_hooked(call.module):
            raise NotUnderstood(str(node.target))
        return table[key]


def _is_hooked(module: nn.Module | None) -> bool:
    """Whether something else than its class has a say in what a module computes."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _check(axes: Axes, shape: tuple[int, ...]) -> None:
    """A rule's answer fits the result; where it does not, the call was another one than the rule knows."""
    lengths = [axis_length(axis) if axis else size for axis, size in zip(axes, shape)]
    if len(axes) != len(shape) or tuple(lengths) != shape:
        raise NotUnderstood("a result of another shape")


def _signals(result: Any, axes: Any) -> Any:
    if isinstance(result, Tensor):
        return Signal(shape_of(result), axes or (None,) * result.dim())
    if isinstance(result, (list, tuple)):
        return tuple(_signals(part, axes[place] if axes else None) for place, part in enumerate(result))
    return result


def _holds_tensor(result: Any) -> bool:
    return isinstance(result, Tensor) or (
        isinstance(result, (list, tuple)) and any(_holds_tensor(part) for part in result)
    )
