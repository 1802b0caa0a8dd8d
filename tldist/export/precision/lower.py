"""From the float32 graph, once proved equal, to the profile's precision: step by step, each measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import onnx

from tldist.errors import MachineError, ModelError, RecipeError
from tldist.export.natural import extreme_images
from tldist.export.precision.exclude import within_budget
from tldist.export.precision.fallback import find_half
from tldist.export.precision.graphs import is_whole, with_names
from tldist.export.precision.half import HalfKind
from tldist.export.precision.integer_forms import with_plain_swish, with_pooling
from tldist.export.precision.integer_input import with_integer_input
from tldist.export.precision.quantize import Plan, calibrate, quantizable, quantize, warn_about_saturation
from tldist.export.precision.running import observe
from tldist.export.precision.steps import GAIN, Judge, Recorder, Step, ratio, unmeasured
from tldist.export.profile import Profile
from tldist.progress import say, warn
from tldist.runtime.session import CPU

Optimize = Literal["all", "measured", "none"]

_SEEN = 4
"""Pictures on which two graphs are run side by side, all values inside them in memory."""
_RANKED = 16
"""Pictures on which the roundings of int8 are ranked."""


@dataclass(frozen=True)
class Lowered:
    """A graph in the profile's precision.

    Attributes:
        proto: the graph.
        steps: how it came to be; the first is the exporter's graph.
    """

    proto: onnx.ModelProto
    steps: tuple[Step, ...]

    def to_dicts(self) -> tuple[dict[str, object], ...]:
        """The steps as plain JSON data."""
        return tuple(step.to_dict() for step in self.steps)


def lower(
    proto: onnx.ModelProto,
    profile: Profile,
    *,
    judge: Judge,
    judged: np.ndarray,
    calibration: np.ndarray | None = None,
    optimize: Optimize = "all",
) -> Lowered:
    """Convert a float32 graph to the precision of a profile.

    Args:
        proto: float32 inside, uint8 (batch, H, W, 3) in.
        profile: what it is made for.
        judge: says what parity with PyTorch finds wrong in a graph; nothing where it agrees.
        judged: uint8 (N, H, W, 3), real pictures: the decisions of the float32 graph on them are what int8 is
            held to.
        calibration: uint8 (N, H, W, 3), pictures that the ranges of int8 are measured on.
        optimize: which of the steps that precision can do without are made: all; those that measure faster;
            or none.

    Raises:
        CheckFailed: the precision does not agree, whatever stays in float32.
        MachineError: the profile's provider cannot run the precision.
        ModelError: the graph cannot be converted (too large, or nothing in it to convert).
        RecipeError: int8 without calibration images.
    """
    if not is_whole(proto):
        reason = "the graph is larger than 2 GB: it is neither converted nor measured in memory"
        if profile.precision != "fp32":
            raise ModelError(f"{reason}; {profile.precision} is for smaller ones, use a profile of fp32.")
        return Lowered(proto, (unmeasured(proto, reason),))
    if profile.precision == "bf16" and profile.provider == CPU:
        raise MachineError(f"{CPU} has no bf16 kernels; bf16 is for a GPU's provider.")
    if profile.precision == "int8" and (calibration is None or not len(calibration)):
        raise RecipeError("int8 needs pictures to calibrate on: give calibration=D, or data=D.")
    named = with_names(proto)
    recorder = Recorder(named, profile, judge, judged)
    recorder.add("exporter", "the exporter's graph, by its own optimiser", named, named)
    if profile.precision == "int8":
        assert calibration is not None
        named = _int8(named, recorder, calibration, optimize)
    elif profile.precision != "fp32":
        named = _half(named, recorder, profile.precision)
    recorder.add_levels(named)
    if profile.precision == "fp32":
        return Lowered(proto, tuple(recorder.steps))
    _say_gain(recorder.steps, profile.precision)
    return Lowered(named, tuple(recorder.steps))


def _half(proto: onnx.ModelProto, recorder: Recorder, kind: HalfKind) -> onnx.ModelProto:
    profile = recorder.profile
    height, width = recorder.judged.shape[1:3]
    seen = np.concatenate([recorder.judged[:_SEEN], *extreme_images(height, width).values()])
    found = find_half(
        proto,
        kind,
        recorder.judge,
        seen,
        keep=dict.fromkeys(profile.keep_fp32, "the profile says so"),
        watch=partial(observe, provider=profile.provider, options=profile.provider_options),
    )
    half = found.half
    what = f"{half.lowered} nodes and {half.weights:,} weights from float32 to {kind}"
    if half.lost:
        what += f"; {half.lost:,} weights too small for it are 0"
    what += f"; float32 stay {_listed(half.kept)} ({found.tried} graphs judged)"
    recorder.add(kind, what, proto, half.proto)
    return half.proto


def _int8(
    proto: onnx.ModelProto, recorder: Recorder, images: np.ndarray, optimize: Optimize
) -> onnx.ModelProto:
    profile = recorder.profile
    how = profile.quantization
    warn_about_saturation(how, profile.provider)
    plain = with_plain_swish(proto)
    plan = Plan(plain, calibrate(plain, how, images[: how.samples]), how, profile.provider)
    made = quantize(plan)
    per = "output channel" if how.per_channel else "tensor"
    what = (
        f"{len(quantizable(plan))} nodes to int8 weights and {how.activation} values, ranges by {how.method} "
        f"over {min(len(images), how.samples)} pictures, one scale a weight's {per}"
    )
    recorder.add("int8", what, proto, made)
    if optimize != "none" and how.activation == "uint8":
        plan, made = _in_integers(plan, made, recorder, optimize)
    return _exclude(plan, made, recorder)


def _in_integers(
    plan: Plan, made: onnx.ModelProto, recorder: Recorder, optimize: Optimize
) -> tuple[Plan, onnx.ModelProto]:
    """The steps that keep values in int8 where the quantiser leaves float32 between."""
    for name, what, rewrite in _REWRITINGS:
        changed = rewrite(plan)
        if changed is None:
            continue
        after = quantize(changed)
        before_ms, after_ms = recorder.latency(made, after)
        share, dropped = ratio(before_ms, after_ms), ""
        if optimize == "measured" and share > GAIN:
            dropped = f"takes {share:.2f} of the time without it: not faster here"
            say(f"{name}: {dropped}; undone")
        recorder.add(name, what, made, after, after_ms, dropped)
        if not dropped:
            plan, made = changed, after
    return plan, made


def _integer_input(plan: Plan) -> Plan | None:
    border = with_integer_input(plan.proto)
    return replace(plan, proto=border.proto, border=border) if border else None


def _pooling(plan: Plan) -> Plan | None:
    proto, count = with_pooling(plan.proto)
    return replace(plan, proto=proto) if count else None


def _gates(plan: Plan) -> Plan | None:
    has_any = any(node.op_type == "HardSigmoid" for node in plan.proto.graph.node)
    return replace(plan, gates=True) if has_any else None


_REWRITINGS: tuple[tuple[str, str, Callable[[Plan], Plan | None]], ...] = (
    (
        "integer input",
        "normalisation as one addition on bytes; its scale goes into the first convolution",
        _integer_input,
    ),
    ("integer pooling", "the mean over positions as GlobalAveragePool, which has an int8 kernel", _pooling),
    (
        "integer gates",
        "hard-sigmoid (of hard-swish, squeeze-excitation) as a saturating int8 addition",
        _gates,
    ),
)
"""Steps that int8 can do without, in order: name, what it does, how."""


def _exclude(plan: Plan, made: onnx.ModelProto, recorder: Recorder) -> onnx.ModelProto:
    """Within the budget of flipped decisions, with as few layers in float32 as that needs."""
    budget, least = plan.how.budget, recorder.profile.tolerances.min_cosine

    def within(proto: onnx.ModelProto) -> str:
        near = recorder.closeness(proto)
        if near.cosine is None:
            return "a value is NaN or infinite"
        if near.flipped is not None and near.flipped > budget * (near.decided or 0):
            return f"{near.flipped} of {near.decided} decisions flip, at most {budget:.1%} may"
        if near.flipped is None and near.cosine < least:
            return f"cosine {near.cosine:.5f} to float32, at least {least} expected"
        return next(iter(recorder.judge(proto)), "")

    found = within_budget(plan, within, recorder.judged[:_RANKED])
    if found.names:
        what = f"{_listed(found.names)} back to float32, because {found.first} ({found.tried} graphs tried)"
        recorder.add("float32 layers", what, made, found.proto)
    return found.proto


def _listed(names: Collection[str], most: int = 12) -> str:
    shown = ", ".join(list(names)[:most])
    return f"{len(names)} nodes ({shown}{', ...' if len(names) > most else ''})" if names else "no nodes"


def _say_gain(steps: Sequence[Step], precision: str) -> None:
    """Say what the precision brought; a precision that does not measure faster is kept, and that is said."""
    kept = [step for step in steps if step.latency and not step.dropped]
    if len(kept) < 2:
        return
    share = ratio(kept[0].latency or {}, kept[-1].latency or {})
    size = kept[-1].bytes[1] / kept[0].bytes[0]
    text = f"{precision}: {1 / share:.2f} times as fast as float32 here, {size:.0%} of its bytes"
    (say if share < GAIN else warn)(text if share < GAIN else f"{text}: it does not measure faster.")
