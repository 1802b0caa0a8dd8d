"""What is known about the axes of a network's tensors while its graph is followed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tldist.fuse.rebasin.axes import Axis, AxisTable, axis_length
from tldist.fuse.rebasin.spec import Group, Place, Spec, Tap
from tldist.models.chain import Affine, Scale

Axes = tuple[Axis | None, ...]
"""One a dimension; None: its positions must stay where they are (batch, space, the network's input)."""


@dataclass(frozen=True)
class Signal:
    """A tensor on its way through the network, or one of the network's own.

    Attributes:
        shape: in the traced run.
        axes: one a dimension.
    """

    shape: tuple[int, ...]
    axes: Axes


@dataclass(frozen=True)
class Call:
    """A module, function or method at work.

    Attributes:
        args, kwargs: `Signal` in the place of tensors.
        shape: of the tensor that comes out.
        module: what is called, and ``path``, where it lies; None and "" for a function.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: tuple[int, ...] = ()
    module: Any = None
    path: str = ""
    signals: list[Signal] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signals", list(_signals_in((self.args, self.kwargs))))

    @property
    def input(self) -> Signal:
        """The tensor that is worked on."""
        return self.signals[0]

    def option(self, place: int, name: str, default: Any = None) -> Any:
        """An argument by its place or its name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)


def _signals_in(value: Any) -> Iterator[Signal]:
    if isinstance(value, Signal):
        yield value
    elif isinstance(value, dict):
        yield from _signals_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _signals_in(part)


class NotUnderstood(Exception):
    """A rule meets what it has no answer for: all that goes in keeps its order."""


class Network:
    """Collects what rules find out.

    Args:
        model: whose tensors are permuted.
    """

    def __init__(self, model: nn.Module) -> None:
        self.table = AxisTable()
        self.tensors = dict(model.state_dict(keep_vars=True))
        self.learned = {name for name, _ in model.named_parameters(remove_duplicate=False)} | {
            f"{path}.{name}"  # numbers of a chain's transforms: fitted, though not by gradients
            for path, module in model.named_modules()
            if isinstance(module, Affine | Scale)
            for name, _ in module.named_buffers()
        }
        # Tied tensors are one tensor here, and all their names at the end.
        self._first: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            self._first.setdefault(id(tensor), name)
        self._own: dict[str, Signal] = {}
        self._watched: list[tuple[str, str, int, Axis]] = []

    def tensor(self, name: str) -> Signal | None:
        """A parameter or buffer; None where a module has none of this name, as a layer without bias."""
        if name not in self.tensors:
            return None
        tensor = self.tensors[name]
        name = self._first[id(tensor)]
        if name not in self._own:
            axes = tuple(self.new(size, f"{name}:{axis}") for axis, size in enumerate(tensor.shape))
            self._own[name] = Signal(tuple(tensor.shape), axes)
        return self._own[name]

    def may_move(self, name: str) -> bool:
        """Whether a tensor that a function is given may be permuted.

        Not a constant: buffers of other kinds are tables, of positions say, which merged models must share.
        """
        leaf = name.rpartition(".")[2]
        return name in self.learned or leaf in ("running_mean", "running_var")

    def new(self, size: int, label: str) -> Axis | None:
        """An axis that is free so far; None for one position, of which there is one order."""
        return self.table.new(size, label) if size > 1 else None

    def join(self, signal: Signal, dim: int, other: Axis | None) -> Axis | None:
        """Let a dimension of a signal have the order of another axis."""
        return self.table.join(signal.axes[dim], other)

    def pin(self, *axes: Axis | None) -> None:
        """Let axes keep their order."""
        for axis in axes:
            self.table.pin(axis)

    def pin_all(self, signals: Sequence[Signal]) -> None:
        """Let all axes of signals keep their order."""
        for signal in signals:
            self.pin(*signal.axes)

    def pin_module(self, path: str) -> None:
        """Let the tensors of a module, and of all below it, keep their order."""
        for name in self.tensors:
            own = self.tensor(name) if name.startswith(f"{path}.") else None
            self.pin_all([own] if own else [])

    def watch(self, path: str, side: str, dim: int, axis: Axis | None) -> None:
        """Note where the units of an axis can be watched."""
        if axis is not None:
            self._watched.append((path, side, dim, axis))

    def spec(self) -> Spec:
        """The groups of all that is free."""
        places: dict[int, list[Place]] = {}
        taps: dict[int, list[Tap]] = {}
        sizes: dict[int, int] = {}
        for name, (axis, offset, segment) in self._segments():
            sizes[segment.variable] = segment.size
            places.setdefault(segment.variable, []).extend(
                Place(alias, axis, offset, segment.block, alias in self.learned)
                for alias, tensor in self.tensors.items()
                if self._first[id(tensor)] == name
            )
        for path, side, dim, watched in self._watched:
            for offset, segment in self._free(watched):
                taps.setdefault(segment.variable, []).append(Tap(path, side, dim, offset, segment.block))
        groups = tuple(
            Group(
                self.table.labels[key],
                sizes[key],
                tuple(places[key]),
                tuple(dict.fromkeys(taps.get(key, []))),
            )
            for key in sorted(places)
        )
        return Spec(groups, self._share(groups))

    def _segments(self) -> Iterator[tuple[str, tuple[int, int, Any]]]:
        for name, signal in self._own.items():
            for dim, axis in enumerate(signal.axes):
                for offset, segment in self._free(axis):
                    yield name, (dim, offset, segment)

    def _free(self, axis: Axis | None) -> Iterator[tuple[int, Any]]:
        """The free segments of an axis with their offsets."""
        offset = 0
        for segment in self.table.resolve(axis or ()):
            if segment.size > 1 and self.table.is_free(segment):
                yield offset, segment
            offset += axis_length((segment,))

    def _share(self, groups: Sequence[Group]) -> float:
        """See `Spec.share`."""
        free: dict[tuple[str, int], int] = {}
        for group in groups:
            for place in group.places:
                key = (place.tensor, place.axis)
                free[key] = free.get(key, 0) + group.size * place.block
        aligned = total = 0.0
        for name in self.learned & self.tensors.keys():
            shape = self.tensors[name].shape
            axes = [axis for axis, size in enumerate(shape[:2]) if size > 1]
            parts = [free.get((name, axis), 0) / shape[axis] for axis in axes]
            total += shape.numel()
            aligned += shape.numel() * sum(parts) / max(1, len(parts))
        return aligned / max(1.0, total)


def shape_of(value: Tensor) -> tuple[int, ...]:
    """As plain numbers."""
    return tuple(int(size) for size in value.shape)
