"""Where a graph departs from PyTorch, as plain data and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Departure:
    """The first value that departs, and the node that computes it.

    Attributes:
        stage: what is wrong. ``graph``: a node of the ONNX graph. ``session``: the graph is right, but ONNX
            Runtime's optimisation or provider is not. ``program``: what torch.export recorded is something
            else than the module computes.
        value: name of the value (in the program, of the operation's node).
        node: name of the node that computes it; empty where no node can be named.
        op: its type.
        module: path of the PyTorch module it belongs to; empty where not known.
        position: of the largest error in the tensor.
        expected: PyTorch's value there; None where it is NaN or infinite, as ``shown`` says.
        found: the package's value there; None likewise.
        relative: their difference as a share of the tensor's largest value; None where it is not finite.
        tolerance: that was held to.
        agrees: name of the last value before it that agrees; empty where none does.
        between: other nodes between the two, any of which may be the cause: ``name (type)``.
        why: what was found at the node: a weight or an attribute that is another one.
        shown: both values as text, NaN and infinity included.
    """

    stage: Literal["graph", "session", "program"]
    value: str
    node: str
    op: str
    module: str
    position: tuple[int, ...]
    expected: float | None
    found: float | None
    relative: float | None
    tolerance: float
    agrees: str = ""
    between: tuple[str, ...] = ()
    why: str = ""
    shown: tuple[str, str] = ("", "")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            **vars(self),
            "position": list(self.position),
            "between": list(self.between),
            "shown": list(self.shown),
        }

    def to_text(self) -> str:
        """A few lines for people."""
        share = "" if self.relative is None else f" (relative error {self.relative:.1e})"
        where = ", ".join(map(str, self.position))
        node = f": {self.op} node '{self.node}'" if self.node else ""
        lines = [
            f"{_STAGES[self.stage]}{node}" + (f" of module {self.module}" if self.module else ""),
            f"  its output '{self.value}' at [{where}]: PyTorch {self.shown[0]}, "
            f"package {self.shown[1]}{share}",
        ]
        if self.agrees:
            lines.append(f"  the last value before it that agrees: '{self.agrees}'")
        if self.between:
            shown = ", ".join(self.between[:_SHOWN])
            more = len(self.between) - _SHOWN
            lines.append(f"  between the two lie also: {shown}{f' and {more} more' if more > 0 else ''}")
        if self.why:
            lines.append(f"  {self.why}")
        return "\n".join(lines)


_SHOWN = 5
_STAGES = {
    "graph": "first departure",
    "session": "the graph is right, ONNX Runtime's optimisation or provider is not",
    "program": "torch.export recorded something else than the module computes",
}


def finite(value: float) -> float | None:
    """A number that JSON can hold."""
    return value if math.isfinite(value) else None
