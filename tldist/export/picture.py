"""Whole pictures as a graph's input: resize and centre crop as ONNX nodes, in front of the network.

They compute what `tldist.runtime.preprocess.fit` computes, to one grey level of 255: Pillow resizes the
width first, rounds to whole grey levels within 0 and 255, then the height, and so do they.
``exclude_outside``: near the border, Pillow (and PyTorch) leave out what lies outside of the picture, where
ONNX would repeat the border.
"""

from __future__ import annotations

import onnx

from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.session import INPUT

SCOPE = "picture"
FITTED = f"{SCOPE}.fitted"

_MODES = {
    "bilinear": 'mode = "linear"',
    # Pillow's and PyTorch's antialiased cubic is Keys' with a = -0.5; ONNX assumes -0.75.
    "bicubic": 'mode = "cubic", cubic_coeff_a = -0.5',
}
_SCOPES = "pkg.torch.onnx.name_scopes"

# Sizes are vectors of one or two whole numbers, [H, W]. Division truncates, as `int` does in `fit`; half
# of what is cropped off is rounded half to even, as `round` does: of spare = 2 k + odd, to k + odd (k mod 2).
_TEXT = """
fit (uint8[batch, height, width, 3] images) => (uint8[batch, {height}, {width}, 3] fitted)
<int64[2] crop = {{{height}, {width}}}, int64[1] short = {{{short}}}, int64[1] crop_width = {{{width}}},
 int64[1] at_0 = {{0}}, int64[1] at_1 = {{1}}, int64[1] at_2 = {{2}}, int64[1] at_3 = {{3}},
 int64[4] fixed = {{0, {height}, {width}, 3}},
 float half = {{0.5}}, float black = {{0}}, float white = {{255}}>
{{
  count = Shape<start = 0, end = 1>(images)
  rows = Shape<start = 1, end = 2>(images)
  size = Shape<start = 1, end = 3>(images)
  shorter = ReduceMin(size)
  enlarged = Mul(size, short)
  scaled = Div(enlarged, shorter)
  spare = Sub(scaled, crop)
  k = Div(spare, at_2)
  odd = Mod(spare, at_2)
  k_odd = Mod(k, at_2)
  up = Mul(odd, k_odd)
  begin = Add(k, up)
  finish = Add(begin, crop)
  scaled_height = Slice(scaled, at_0, at_1)
  scaled_width = Slice(scaled, at_1, at_2)
  top = Slice(begin, at_0, at_1)
  left = Slice(begin, at_1, at_2)
  bottom = Slice(finish, at_0, at_1)
  right = Slice(finish, at_1, at_2)
  across = Concat<axis = 0>(count, at_3, rows, scaled_width)
  down = Concat<axis = 0>(count, at_3, scaled_height, crop_width)

  channels = Transpose<perm = [0, 3, 1, 2]>(images)
  pixels = Cast<to = 1>(channels)
  wide = Resize<{mode}, antialias = 1, exclude_outside = 1>(pixels, , , across)
  wide_crop = Slice(wide, left, right, at_3)
  wide_half = Add(wide_crop, half)
  wide_floor = Floor(wide_half)
  wide_whole = Clip(wide_floor, black, white)
  high = Resize<{mode}, antialias = 1, exclude_outside = 1>(wide_whole, , , down)
  high_crop = Slice(high, top, bottom, at_2)
  high_half = Add(high_crop, half)
  high_floor = Floor(high_half)
  high_whole = Clip(high_floor, black, white)
  levels = Cast<to = 2>(high_whole)
  last = Transpose<perm = [0, 2, 3, 1]>(levels)
  fitted = Reshape(last, fixed)
}}
"""


def fit_graph(how: Preprocessing) -> onnx.GraphProto:
    """Resize and centre crop: uint8 (batch, height, width, 3) to `FITTED`, uint8 (batch, H, W, 3).

    All pictures of a batch have one size.
    """
    short = max(how.resize, how.height, how.width)
    mode = _MODES[how.interpolation]
    text = _TEXT.format(height=how.height, width=how.width, short=short, mode=mode)
    graph = onnx.parser.parse_graph(text)
    names = {name: f"{SCOPE}.{name}" for name in _values(graph)} | {INPUT: INPUT}
    for node in graph.node:
        node.name = f"{SCOPE}.{node.output[0]}/{node.op_type}"
        node.metadata_props.add(key=_SCOPES, value=str(["", SCOPE, node.output[0]]))
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names[name] for name in node.output]
    for tensor in graph.initializer:
        tensor.name = names[tensor.name]
    graph.output[0].name = FITTED
    return graph


def take_pictures(proto: onnx.ModelProto, how: Preprocessing) -> None:
    """Let a graph that takes images of one size take whole pictures of any: changes ``proto``."""
    front = fit_graph(how)
    graph = proto.graph
    for node in graph.node:
        node.input[:] = [FITTED if name == INPUT else name for name in node.input]
    nodes = [*front.node, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.extend(front.input)
    graph.initializer.extend(front.initializer)


def _values(graph: onnx.GraphProto) -> list[str]:
    """Names of all that is computed, and of all constants."""
    return [name for node in graph.node for name in node.output] + [t.name for t in graph.initializer]
