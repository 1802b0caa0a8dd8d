"""Whole pictures as a graph's input: resize and centre crop as ONNX nodes, in front of the network.

They compute what `tldist.runtime.preprocess.fit` computes, bit by bit, by Pillow's own arithmetic (its
``Resample.c``): the weights of each output pixel in float64, rounded to whole multiples of 2^-22; their
products with the pixels summed in int32, rounded and cut to 0..255; first along the width, then along the
height. ONNX's own Resize is not that: it rounds elsewhere, so that pixels differ by one or two grey levels,
and the parity of the whole could only be shown to that coarseness.
"""

from __future__ import annotations

import numpy as np
import onnx

from tldist.runtime.preprocess import Preprocessing
from tldist.runtime.session import INPUT

SCOPE = "picture"
FITTED = f"{SCOPE}.fitted"

_SCOPES = "pkg.torch.onnx.name_scopes"

# Sizes are vectors of one or two whole numbers, [H, W]. Division truncates, as `int` does in `fit`; half of
# what is cropped off is rounded half to even, as `round` does: of spare = 2 k + odd, to k + odd (k mod 2).
_SIZES = """
  size = Shape<start = 1, end = 3>(images)
  rows = Slice(size, i0, i1)
  columns = Slice(size, i1, i2)
  shorter = ReduceMin(size)
  enlarged = Mul(size, short)
  scaled = Div(enlarged, shorter)
  spare = Sub(scaled, crop)
  k = Div(spare, i2)
  odd = Mod(spare, i2)
  k_odd = Mod(k, i2)
  up = Mul(odd, k_odd)
  begin = Add(k, up)
"""

# Along one side: of each output pixel within the crop, the places (N_out, taps) of the input pixels that it
# is made of, and their weights, int32 (N_out, taps) in units of 2^-22. X stands for the side's name.
_WEIGHTS = """
  X_scaled = Slice(scaled, {at}, {after})
  X_first = Slice(begin, {at}, {after})
  X_in = Cast<to = 11>({side})
  X_out = Cast<to = 11>(X_scaled)
  X_place = Cast<to = 11>(X_first)
  X_scale = Div(X_in, X_out)
  X_stretch = Max(X_scale, d1)
  X_support = Mul(X_stretch, reach)
  X_around = Ceil(X_support)
  X_both = Mul(X_around, d2)
  X_taps = Add(X_both, d1)
  X_number = Squeeze(X_taps)
  X_tap = Range(d0, X_number, d1)
  X_pixel = Add(X_place, X_crop)
  X_middle = Add(X_pixel, half)
  X_center = Mul(X_middle, X_scale)
  X_low = Sub(X_center, X_support)
  X_low_half = Add(X_low, half)
  X_low_whole = Floor(X_low_half)
  X_from = Max(X_low_whole, d0)
  X_high = Add(X_center, X_support)
  X_high_half = Add(X_high, half)
  X_high_whole = Floor(X_high_half)
  X_to = Min(X_high_whole, X_in)
  X_from_column = Unsqueeze(X_from, i1)
  X_to_column = Unsqueeze(X_to, i1)
  X_center_column = Unsqueeze(X_center, i1)
  X_at = Add(X_from_column, X_tap)
  X_inside = Less(X_at, X_to_column)
  X_away = Sub(X_at, X_center_column)
  X_away_half = Add(X_away, half)
  X_narrow = Div(d1, X_stretch)
  X_signed = Mul(X_away_half, X_narrow)
  X_u = Abs(X_signed)
{filter}
  X_kept = Where(X_inside, X_value, d0)
  X_sum = ReduceSum(X_kept, i1)
  X_share = Div(X_kept, X_sum)
  X_fine = Mul(X_share, unit)
  X_sign = Sign(X_fine)
  X_sign_half = Mul(X_sign, half)
  X_rounded = Add(X_fine, X_sign_half)
  X_weights = Cast<to = 6>(X_rounded)
  X_border = Sub(X_in, d1)
  X_there = Min(X_at, X_border)
  X_places = Cast<to = 7>(X_there)
"""

# The side to resize comes first, so that whole rows of memory are gathered and added up.
_APPLY = """
  X_where = Reshape(X_places, flat)
  X_taken = Gather<axis = 0>(X_first_axis, X_where)
  X_shape = Shape(X_places)
  X_grid = Concat<axis = 0>(X_shape, flat)
  X_pixels = Reshape(X_taken, X_grid)
  X_whole = Cast<to = 6>(X_pixels)
  X_factors = Unsqueeze(X_weights, i2)
  X_products = Mul(X_whole, X_factors)
  X_total = ReduceSum<keepdims = 0>(X_products, i1)
  X_to_half = Add(X_total, round)
  X_positive = Max(X_to_half, black)
  X_levels = Div(X_positive, shift)
  X_bounded = Min(X_levels, white)
  X_bytes = Cast<to = 2>(X_bounded)
"""

_LINEAR = """  X_less = Sub(d1, X_u)
  X_value = Max(X_less, d0)"""

# Keys' cubic with a = -0.5, in the order of Pillow's multiplications: 1.5 u^3 - 2.5 u^2 + 1 within 1, and
# a (u^3 - 5 u^2 + 8 u - 4) up to 2.
_CUBIC = """  X_a = Mul(X_u, c1_5)
  X_b = Sub(X_a, c2_5)
  X_c = Mul(X_b, X_u)
  X_d = Mul(X_c, X_u)
  X_near = Add(X_d, d1)
  X_e = Sub(X_u, c5)
  X_f = Mul(X_e, X_u)
  X_g = Add(X_f, c8)
  X_h = Mul(X_g, X_u)
  X_i = Sub(X_h, c4)
  X_far = Mul(X_i, a)
  X_is_near = Less(X_u, d1)
  X_is_far = Less(X_u, d2)
  X_tail = Where(X_is_far, X_far, d0)
  X_value = Where(X_is_near, X_near, X_tail)"""

_FILTERS = {"bilinear": (_LINEAR, 1), "bicubic": (_CUBIC, 2)}
"""The filter, and how far it reaches."""
_CUBIC_CONSTANTS = {"c1_5": 1.5, "c2_5": 2.5, "c4": 4.0, "c5": 5.0, "c8": 8.0, "a": -0.5}


def fit_graph(how: Preprocessing) -> onnx.GraphProto:
    """Resize and centre crop: uint8 (batch, height, width, 3) to `FITTED`, uint8 (batch, H, W, 3).

    All pictures of a batch have one size. The largest tensor holds 4 bytes a colour, row of the picture,
    column of the crop and tap (of a picture of 12 megapixels, 200 MB; twice that with bicubic).
    """
    graph = onnx.parser.parse_graph(_text(how))
    graph.initializer.extend(_constants(how))
    names = {name: f"{SCOPE}.{name}" for name in _values(graph)} | {INPUT: INPUT}
    for node in graph.node:
        node.name = f"{SCOPE}.{node.output[0]}/{node.op_type}"
        node.metadata_props.add(key=_SCOPES, value=str(["", SCOPE, node.output[0]]))
        node.input[:] = [names[name] for name in node.input]
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


def _text(how: Preprocessing) -> str:
    weights = _WEIGHTS.replace("{filter}", _FILTERS[how.interpolation][0])
    across = weights.format(at="i1", after="i2", side="columns").replace("X_", "across_")
    down = weights.format(at="i0", after="i1", side="rows").replace("X_", "down_")
    return f"""
fit (uint8[batch, height, width, 3] images) => (uint8[batch, {how.height}, {how.width}, 3] fitted) {{
  {_SIZES}{across}{down}
  lines = Reshape(images, keep_lines)
  columns_first = Transpose<perm = [2, 0, 1]>(lines)
  columns_shape = Concat<axis = 0>(columns, flat)
  across_first_axis = Reshape(columns_first, columns_shape)
  {_APPLY.replace("X_", "across_")}
  batch_and_rows = Shape<start = 0, end = 2>(images)
  rows_shape = Concat<axis = 0>(flat, batch_and_rows)
  rows_last = Reshape(across_bytes, rows_shape)
  down_first_axis = Transpose<perm = [2, 0, 1]>(rows_last)
  {_APPLY.replace("X_", "down_")}
  batch_last = Reshape(down_bytes, cropped)
  batch_first = Transpose<perm = [2, 0, 1]>(batch_last)
  fitted = Reshape(batch_first, fixed)
}}"""


def _constants(how: Preprocessing) -> list[onnx.TensorProto]:
    height, width = how.height, how.width
    whole = {
        "i0": [0],
        "i1": [1],
        "i2": [2],
        "flat": [-1],
        "crop": [height, width],
        "short": [max(how.resize, height, width)],
        "keep_lines": [0, 0, -1],
        "cropped": [height, 3 * width, -1],
        "fixed": [-1, height, width, 3],
    }
    real = {"d0": 0.0, "d1": 1.0, "d2": 2.0, "half": 0.5, "unit": 2.0**22}
    real |= {"reach": float(_FILTERS[how.interpolation][1])}
    real |= _CUBIC_CONSTANTS if how.interpolation == "bicubic" else {}
    levels = {"round": 2**21, "shift": 2**22, "black": 0, "white": 255}
    arrays: dict[str, np.ndarray] = {name: np.array(value, np.int64) for name, value in whole.items()}
    arrays |= {name: np.array(value, np.float64) for name, value in real.items()}
    arrays |= {name: np.array(value, np.int32) for name, value in levels.items()}
    arrays |= {"across_crop": np.arange(width, dtype=np.float64)}
    arrays |= {"down_crop": np.arange(height, dtype=np.float64)}
    return [onnx.numpy_helper.from_array(value, name) for name, value in arrays.items()]


def _values(graph: onnx.GraphProto) -> list[str]:
    """Names of all that is computed, and of all constants."""
    return [name for node in graph.node for name in node.output] + [t.name for t in graph.initializer]
