"""What functions and methods of tensors do to the axes of the tensors that pass through them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torchvision

from tldist.fuse.rebasin.axes import Axis, in_blocks
from tldist.fuse.rebasin.network import Axes, Call, Network, NotUnderstood, Signal
from tldist.models.heads import pool

Rule = Callable[[Network, Call], Any]


def same(net: Network, call: Call) -> Axes:
    """What treats every number by itself, or all alike."""
    if call.input.shape != call.shape or len(call.signals) > 1:
        raise NotUnderstood("a second tensor, or another shape")
    return call.input.axes


def broadcast(net: Network, call: Call) -> Axes:
    """Sums and products, number by number: dimensions are matched from the last one on."""
    found: list[Axis | None] = []
    for dim in range(-len(call.shape), 0):
        wide = [s.axes[dim] for s in call.signals if len(s.shape) >= -dim and s.shape[dim] > 1]
        axis = wide[0] if wide else None
        for other in wide[1:]:
            axis = net.table.join(axis, other)
        found.append(axis)
    return tuple(found)


def reshaped(net: Network, call: Call) -> Axes:
    """Any reshape, by the shapes before and after.

    A dimension lives on where it begins at the same place in both: as it was, or with all that follows in
    the same new dimension as the block of each unit. The others are pinned.
    """
    signal, starts = call.input, _starts(call.shape)
    axes: list[Axis | None] = [None] * len(call.shape)
    for dim, (before, size) in enumerate(zip(_starts(signal.shape), signal.shape)):
        axis = signal.axes[dim]
        if axis is None:
            continue
        target = next((d for d, s in enumerate(starts) if s == before and call.shape[d] > 1), None)
        inside = _merged(signal.shape[dim:], call.shape[target]) if target is not None else None
        if target is None or inside is None or any(signal.axes[dim + 1 : dim + inside]):
            net.pin(axis)
        else:
            axes[target] = in_blocks(axis, call.shape[target] // size)
    return tuple(axes)


def _starts(shape: Sequence[int]) -> list[int]:
    """How many times each dimension is gone through: the product of those before it."""
    return [math.prod(shape[:dim]) for dim in range(len(shape))]


def _merged(sizes: Sequence[int], total: int) -> int | None:
    """How many of the first sizes have the product ``total``; None if it is none."""
    return next((n for n in range(1, len(sizes) + 1) if math.prod(sizes[:n]) == total), None)


def permuted(net: Network, call: Call) -> Axes:
    """``permute`` with its order of dimensions."""
    order = call.option(1, "dims")
    order = order if isinstance(order, (tuple, list)) else call.args[1:]
    return tuple(call.input.axes[dim] for dim in order)


def transposed(net: Network, call: Call) -> Axes:
    """``transpose`` of two dimensions."""
    axes = list(call.input.axes)
    first, second = call.option(1, "dim0"), call.option(2, "dim1")
    axes[first], axes[second] = axes[second], axes[first]
    return tuple(axes)


def expanded(net: Network, call: Call) -> Axes:
    """``expand``: dimensions are matched from the last one on."""
    signal = call.input
    return tuple(
        signal.axes[dim] if len(signal.shape) >= -dim and signal.shape[dim] > 1 else None
        for dim in range(-len(call.shape), 0)
    )


def reduced(net: Network, call: Call) -> Axes:
    """Mean, sum, maximum over some dimensions: the order within them does not matter."""
    signal, dims = call.input, call.option(1, "dim")
    keeps = bool(call.option(2, "keepdim", False))
    if dims is None:
        return (None,) * len(call.shape)
    gone = {dim % len(signal.shape) for dim in (dims if isinstance(dims, (tuple, list)) else [dims])}
    axes = [None if dim in gone else axis for dim, axis in enumerate(signal.axes)]
    return tuple(axis for dim, axis in enumerate(axes) if keeps or dim not in gone)


def concatenated(net: Network, call: Call) -> Axes:
    """``cat``: segments one after the other; the other dimensions have one order in all parts."""
    along = call.option(1, "dim", 0) % len(call.shape)
    axes: list[Axis | None] = []
    for dim in range(len(call.shape)):
        if dim == along:
            parts = [_segments(net, signal, dim) for signal in call.signals]
            axes.append(tuple(segment for part in parts for segment in part))
        else:
            axis = call.signals[0].axes[dim]
            for signal in call.signals[1:]:
                axis = net.join(signal, dim, axis)
            axes.append(axis)
    return tuple(axes)


def _segments(net: Network, signal: Signal, dim: int) -> Axis:
    """An axis as part of a concatenation, where one that keeps its order needs a name too."""
    axis = signal.axes[dim]
    if axis is None:
        axis = net.table.new(signal.shape[dim], "")
        net.pin(axis)
    return axis


def indexed(net: Network, call: Call) -> Axes:
    """``x[...]`` with whole slices, numbers, None and an ellipsis; a part of a dimension pins it."""
    signal, index = call.input, call.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in index):
        raise NotUnderstood("an index that is a tensor or a list")
    used = sum(part is not None and part is not Ellipsis for part in index)
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    axes: list[Axis | None] = []
    dim = 0
    for part in index:
        if part is None:
            axes.append(None)
            continue
        if part is Ellipsis:
            rest = len(signal.shape) - used
            axes += signal.axes[dim : dim + rest]
            dim += rest
            continue
        whole = isinstance(part, slice) and part.indices(signal.shape[dim]) == (0, signal.shape[dim], 1)
        net.pin(None if whole else signal.axes[dim])
        if isinstance(part, slice):
            axes.append(signal.axes[dim] if whole else None)
        dim += 1
    return tuple(axes)


def normalise_last(net: Network, signal: Signal, dims: int, own: Sequence[Signal | None]) -> Axes:
    """A norm over the last dimensions, with numbers of its own for every position there."""
    axes = list(signal.axes)
    for dim in range(-dims, 0):
        for numbers in own:
            if numbers is not None:
                axes[dim] = net.join(numbers, dim, axes[dim])
    return tuple(axes)


def layer_norm(net: Network, call: Call) -> Axes:
    """``F.layer_norm(x, shape, weight, bias, eps)``."""
    own = [call.option(2, "weight"), call.option(3, "bias")]
    return normalise_last(net, call.input, len(call.option(1, "normalized_shape")), own)


def batch_norm(net: Network, call: Call) -> Axes:
    """``F.batch_norm(x, running_mean, running_var, weight, bias, training)`` by the statistics it has."""
    if call.option(5, "training", False):
        raise NotUnderstood("statistics of the batch")
    axes = call.input.axes
    axis = axes[1]
    for numbers in call.signals[1:]:
        axis = net.join(numbers, 0, axis)
    return (axes[0], axis, *axes[2:])


def head_pool(net: Network, call: Call) -> Axes:
    """`tldist.models.heads.pool`: the mean over space, where there is any."""
    return call.input.axes[:2]


def linear(net: Network, call: Call) -> Axes:
    """``F.linear`` by a weight of the network's own."""
    weight, bias = call.option(1, "weight"), call.option(2, "bias")
    axes = call.input.axes
    net.join(weight, 1, axes[-1])
    if bias is not None:
        net.join(bias, 0, weight.axes[0])
    return (*axes[:-1], weight.axes[0])


def pooled(net: Network, call: Call) -> Axes:
    """Pooling of two spatial dimensions."""
    net.pin(*call.input.axes[-2:])
    return (*call.input.axes[:-2], None, None)


_NAMES: dict[Rule, tuple[str, ...]] = {
    same: (
        "relu", "relu_", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "hardsigmoid", "sigmoid",
        "tanh", "softplus", "mish", "dropout", "dropout2d", "softmax", "log_softmax", "stochastic_depth",
        "contiguous", "clone", "neg", "exp", "sqrt", "rsqrt", "square", "abs",
    ),
    broadcast: (
        "add", "add_", "iadd", "sub", "sub_", "isub", "mul", "mul_", "imul", "div", "div_", "truediv",
        "itruediv", "maximum", "minimum",
    ),
    reshaped: ("flatten", "reshape", "view", "squeeze", "unsqueeze", "unflatten"),
    reduced: ("mean", "sum", "amax", "amin"),
    concatenated: ("cat", "concat", "concatenate"),
    permuted: ("permute",),
    transposed: ("transpose", "swapaxes"),
    expanded: ("expand", "expand_as"),
    indexed: ("getitem",),
    layer_norm: ("layer_norm",),
    linear: ("linear",),
    batch_norm: ("batch_norm",),
    pooled: ("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d"),
}  # fmt: skip

METHODS: dict[str, Rule] = {name: rule for rule, names in _NAMES.items() for name in names}
"""The rule of each method of a tensor."""

FUNCTIONS: dict[Any, Rule] = {
    pool: head_pool,
    **{
        getattr(place, name): rule
        for name, rule in METHODS.items()
        for place in (F, operator, torchvision.ops, torch)
        if callable(getattr(place, name, None))
    },
}
"""The rule of each function, by the function itself: one of the same name may be somebody's own."""
