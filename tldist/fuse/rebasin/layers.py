"""What each kind of layer does to the axes of the tensors that pass through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tldist.fuse.rebasin.axes import Axis, in_blocks
from tldist.fuse.rebasin.network import Axes, Call, Network, NotUnderstood, Signal
from tldist.fuse.rebasin.operations import Rule, normalise_last, reshaped, same


def _own(net: Network, call: Call, name: str) -> Signal | None:
    return net.tensor(f"{call.path}.{name}" if call.path else name)


def affine(net: Network, axis: Axis | None, weight: Signal, bias: Signal | None) -> Axis | None:
    """A dense map of ``axis`` by a weight (out, in, ...): the axis that it gives."""
    net.join(weight, 1, axis)
    net.pin(*weight.axes[2:])
    if bias is not None:
        net.join(bias, 0, weight.axes[0])
    return weight.axes[0]


def linear(net: Network, call: Call) -> Axes:
    """`nn.Linear`: reads and makes the last dimension."""
    weight = _own(net, call, "weight")
    assert weight is not None
    axes = call.input.axes
    net.watch(call.path, "input", len(axes) - 1, axes[-1])
    out = affine(net, axes[-1], weight, _own(net, call, "bias"))
    net.watch(call.path, "output", len(axes) - 1, out)
    return (*axes[:-1], out)


def convolution(net: Network, call: Call) -> Axes:
    """Convolutions: dense, or in groups of channels, which are permuted as wholes (depthwise: one by one)."""
    module, axes = call.module, call.input.axes
    channel = len(axes) - 1 - len(module.kernel_size)
    weight, bias = _own(net, call, "weight"), _own(net, call, "bias")
    assert weight is not None
    net.pin(*axes[channel + 1 :])
    net.watch(call.path, "input", channel, axes[channel])
    if module.groups == 1:
        out = affine(net, axes[channel], weight, bias)
    else:
        units = net.table.new(module.groups, f"{call.path}.weight:groups")
        net.table.join(in_blocks(units, module.in_channels // module.groups), axes[channel])
        net.pin(*weight.axes[1:])
        out = net.join(weight, 0, in_blocks(units, module.out_channels // module.groups))
        if bias is not None:
            net.join(bias, 0, out)
    net.watch(call.path, "output", channel, out)
    return (*axes[:channel], out, *(None for _ in module.kernel_size))


def channelwise(net: Network, call: Call) -> Axes:
    """BatchNorm, InstanceNorm: numbers of their own for every channel of dimension 1."""
    axes = call.input.axes
    axis = axes[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        own = _own(net, call, name)
        axis = net.join(own, 0, axis) if own else axis
    return (axes[0], axis, *axes[2:])


def group_norm(net: Network, call: Call) -> Axes:
    """GroupNorm: over all channels or over each; groups of neighbours would have to stay together."""
    if call.module.num_groups not in (1, call.module.num_channels):
        raise NotUnderstood("groups of channels")
    return channelwise(net, call)


def layer_norm(net: Network, call: Call) -> Axes:
    """LayerNorm, RMSNorm: over the last dimensions, with numbers of their own for every position."""
    own = [_own(net, call, name) for name in ("weight", "bias")]
    return normalise_last(net, call.input, len(call.module.normalized_shape), own)


def prelu(net: Network, call: Call) -> Axes:
    """PReLU: one slope, or one for each channel of dimension 1."""
    weight = _own(net, call, "weight")
    assert weight is not None
    if weight.shape[0] > 1:
        net.join(weight, 0, call.input.axes[1])
    return call.input.axes


def spatial(dimensions: int) -> Rule:
    """A rule for what works on each channel by itself, over the last dimensions."""

    def rule(net: Network, call: Call) -> Axes:
        kept = call.input.axes[:-dimensions]
        net.pin(*call.input.axes[-dimensions:])
        return (*kept, *(None for _ in range(dimensions)))

    return rule


def attention(net: Network, call: Call) -> tuple[Axes, None]:
    """`nn.MultiheadAttention`: its heads are a group, the rows of each staying together.

    Raises:
        NotUnderstood: biases of keys and values, masks, or widths that differ.
    """
    module = call.module
    weight, bias = _own(net, call, "in_proj_weight"), _own(net, call, "in_proj_bias")
    out_weight, out_bias = _own(net, call, "out_proj.weight"), _own(net, call, "out_proj.bias")
    plain = module.bias_k is None and not module.add_zero_attn and len(call.signals) == 3
    plain = plain and call.option(6, "average_attn_weights", True)
    if weight is None or out_weight is None or not plain:
        raise NotUnderstood("attention with more than queries, keys and values of one width")
    axis = call.input.axes[-1]
    for signal in call.signals:
        axis = net.join(signal, -1, axis)
        net.pin(*signal.axes[:-1])
    heads = net.table.new(module.num_heads, f"{call.path}.in_proj_weight:heads")
    rows = in_blocks(heads, module.head_dim)
    affine(net, axis, weight, bias)
    net.join(weight, 0, rows * 3)
    net.watch(call.path, "input", len(call.input.axes) - 1, axis)
    net.watch(call.path, "attention", 1, heads)
    out = affine(net, rows, out_weight, out_bias)
    return (*(None for _ in call.input.axes[:-1]), out), None


_SPATIAL = {
    1: (nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d),
    2: (nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
        nn.ReflectionPad2d, nn.ReplicationPad2d, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    3: (nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d),
}  # fmt: skip

_PER_NUMBER = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.LogSigmoid,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Softmax, nn.LogSoftmax,
)  # fmt: skip
"""Each number by itself, or (softmax) all numbers alike: a permutation before is one after."""

LAYERS: dict[type[Any], Callable[[Network, Call], Any]] = {
    **dict.fromkeys(_PER_NUMBER, same),
    **{kind: spatial(dimensions) for dimensions, kinds in _SPATIAL.items() for kind in kinds},
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), channelwise),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), channelwise),
    nn.Linear: linear,
    nn.GroupNorm: group_norm,
    nn.LayerNorm: layer_norm,
    nn.RMSNorm: layer_norm,
    nn.PReLU: prelu,
    nn.Flatten: reshaped,
    nn.Unflatten: reshaped,
    nn.MultiheadAttention: attention,
}
"""The rule of each class of layer. Of exactly this class: one that derives from it may compute otherwise."""
