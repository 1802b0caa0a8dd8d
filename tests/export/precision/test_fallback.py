"""The nodes that must stay float32 are found: where fp16 overflows, and where its error grows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from tests.support_precision import Net, judge_against, pictures, run_float, watch
from tldist.errors import CheckFailed
from tldist.export.precision.fallback import find_half
from tldist.export.precision.graphs import with_names
from tldist.export.precision.half import to_half
from tldist.export.precision.search import pruned, smallest_prefix

TOLERANCE = 0.01


def planted(*middle: tuple[str, float]) -> onnx.ModelProto:
    """Two convolutions, some nodes (operator, constant) between them, named by position."""
    net = Net()
    x = net.add("Relu", net.conv(net.normalised(), 3, 8, 3, "first"))
    for number, (op, value) in enumerate(middle):
        x = net.add(op, x, net.constant(value), name=f"middle{number}")
    x = net.add("Relu", net.conv(x, 8, 8, 3, "second"))
    return with_names(net.proto(net.pooled(net.conv(x, 8, 4, 1, "third"))))


def faults(proto: onnx.ModelProto, exact: np.ndarray, seen: np.ndarray) -> list[str]:
    return list(judge_against(exact, seen, TOLERANCE)(proto))


def test_overflow__its_nodes_stay_float32() -> None:
    proto, seen = planted(("Mul", 1e5), ("Mul", 1e-5)), pictures(8)[0]
    exact = run_float(proto, seen)
    assert faults(to_half(proto, "fp16").proto, exact, seen) == ["not finite"]
    found = find_half(proto, "fp16", judge_against(exact, seen, TOLERANCE), seen, watch=watch)
    assert found.faults == ()
    assert faults(found.half.proto, exact, seen) == []
    reasons = {name: why for name, why in found.half.kept.items() if "largest" in why}
    assert set(reasons) == {"middle0", "middle1"}
    assert "middle0.out reaches" in reasons["middle1"]


def test_nearly_an_overflow__counts_as_one() -> None:
    """The largest value seen is within a factor of two of fp16's limit: other images have larger ones."""
    proto, seen = planted(("Mul", 1.0), ("Mul", 1.0)), pictures(8)[0]
    largest = float(np.abs(watch(proto, seen, ["middle0.out"])["middle0.out"]).max())
    proto = planted(("Mul", 40000 / largest), ("Mul", largest / 40000))
    judge = judge_against(run_float(proto, seen), seen, TOLERANCE)
    assert judge(to_half(proto, "fp16").proto) == []
    assert {"middle0", "middle1"} <= set(find_half(proto, "fp16", judge, seen, watch=watch).half.kept)


def test_overflow_inside_a_node__is_found() -> None:
    """A length: what the node reads and gives is within fp16, the squares that it adds up are not."""
    net = Net()
    x = net.add("Mul", net.conv(net.normalised(), 3, 4, name="first"), net.constant(300.0), name="large")
    x = net.add("ReduceL2", x, net.constant([2, 3], np.int64), keepdims=0, name="length")
    proto, seen = with_names(net.proto(net.add("Mul", x, net.constant(1e-3)))), pictures(8)[0]
    exact = run_float(proto, seen)
    assert float(np.abs(exact).max()) * 1e3 < 65504 / 2
    assert faults(to_half(proto, "fp16").proto, exact, seen) == ["not finite"]
    found = find_half(proto, "fp16", judge_against(exact, seen, TOLERANCE), seen, watch=watch)
    assert faults(found.half.proto, exact, seen) == []
    assert "infinite" in found.half.kept["length"]


def test_cancellation__its_nodes_are_found() -> None:
    """x + 2000 - 2000: every value is finite, and fp16 keeps one digit of x."""
    proto, seen = planted(("Add", 2000.0), ("Sub", 2000.0)), pictures(8)[0]
    exact = run_float(proto, seen)
    assert "relative error" in faults(to_half(proto, "fp16").proto, exact, seen)[0]
    found = find_half(proto, "fp16", judge_against(exact, seen, TOLERANCE), seen, watch=watch)
    assert faults(found.half.proto, exact, seen) == []
    chosen = {name for name, why in found.half.kept.items() if "grows" in why}
    assert {"middle0", "middle1"} <= chosen
    assert "second" not in chosen
    assert len(chosen) <= 3
    assert found.tried < 20


def test_kept_by_the_profile__stays(net: onnx.ModelProto, images: np.ndarray, logits: np.ndarray) -> None:
    judge = judge_against(logits, images, TOLERANCE)
    found = find_half(net, "fp16", judge, images[:4], watch=watch, keep={"HardSwish": "mine", "stem": "mine"})
    assert found.tried == 1
    assert {name for name, why in found.half.kept.items() if why == "mine"} >= {"stem"}
    assert sum(why == "mine" for why in found.half.kept.values()) == 3


def test_what_never_agrees__fails_and_says_what_was_tried(net: onnx.ModelProto, images: np.ndarray) -> None:
    with pytest.raises(CheckFailed, match=r"fp16 does not agree.*float32 \(\d+ graphs tried\): never"):
        find_half(net, "fp16", lambda proto: ["never"], images[:2], watch=watch)


# -- the search itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_smallest_prefix__is_the_smallest_and_asks_little(count: int) -> None:
    names = [str(number) for number in range(count)]
    for needed in range(1, count + 1):
        asked: list[int] = []

        def accept(chosen: frozenset[str], needed: int = needed, asked: list[int] = asked) -> bool:
            asked.append(len(chosen))
            return set(names[:needed]) <= chosen

        assert smallest_prefix(names, accept) == tuple(names[:needed])
        assert len(asked) <= 2 * np.log2(count + 1) + 2


def test_smallest_prefix__none_where_all_are_not_enough() -> None:
    assert smallest_prefix(["a", "b", "c"], lambda chosen: False) is None


def test_pruned__leaves_what_is_needed() -> None:
    chosen = tuple("abcdefg")
    assert pruned(chosen, lambda names: {"b", "f"} <= names) == ("b", "f")
    assert pruned(chosen, lambda names: {"b", "f"} <= names, most=2) == ("a", "b", "c", "d", "e", "f")
    assert pruned(("a",), lambda names: True) == ("a",)
