"""What is merged into what: kind, type and shape of each merged tensor, and which process merges it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tldist.errors import BundleError
from tldist.fuse.weights.files import FLOATING, Slot, Weights
from tldist.fuse.weights.merge import model_shares
from tldist.fuse.weights.method import Method, Settings
from tldist.fuse.weights.policy import Kind, kind_of, widest
from tldist.fuse.weights.rows import RowPlan


@dataclass(frozen=True)
class Fusion:
    """What is merged into what.

    Attributes:
        models: whose tensors.
        base: their common ancestor; None where the method does not use it.
        method, settings: how.
        rows: the heads whose rows are put together by class, by tensor name.
        aids: statistics that go with each model, by the same names; empty for most methods.
    """

    models: Sequence[Weights]
    base: Weights | None
    method: Method
    settings: Settings
    rows: Mapping[str, RowPlan] = field(default_factory=dict)
    aids: Sequence[Weights] = ()

    @property
    def everyone(self) -> list[Weights]:
        """The base first, where there is one."""
        return [self.base, *self.models] if self.base else list(self.models)

    @property
    def shares(self) -> tuple[float, ...]:
        """Of ``everyone``, sum 1: for what is not learned."""
        return model_shares(self.method, self.settings, self.base is not None)


@dataclass(frozen=True)
class Target:
    """One tensor of the result."""

    slot: Slot
    kind: Kind


def plan_targets(fusion: Fusion) -> list[Target]:
    """Kind, type and shape of each merged tensor, in the order in which the first model holds them.

    Raises:
        BundleError: the models do not hold the same tensors, or a shape differs.
    """
    first = fusion.models[0]
    names = first.entries.keys()
    for other in fusion.everyone:
        odd = sorted(names ^ other.entries.keys())
        if odd:
            raise BundleError(
                f"{other.label} and {first.label} do not hold the same tensors: {odd[0]} and "
                f"{len(odd) - 1} more are in one of them only."
            )
    return [_target(fusion, name) for name in names]


def _target(fusion: Fusion, name: str) -> Target:
    entries = [model.entries[name] for model in fusion.everyone]
    dtype = widest([entry.dtype for entry in entries])
    kind = kind_of(name, dtype, fusion.models[0].entries)
    rows = fusion.rows.get(name)
    shapes = {entry.shape[1:] if rows else entry.shape for entry in entries}
    if len(shapes) > 1:
        found = ", ".join(str(list(entry.shape)) for entry in entries)
        raise BundleError(f"the tensor '{name}' has different shapes: {found}.")
    if kind != "learned" and any(entry.dtype != dtype for entry in entries) and dtype not in FLOATING:
        raise BundleError(f"the tensor '{name}' has different types.")
    shape = (rows.count, *entries[0].shape[1:]) if rows else entries[0].shape
    return Target(Slot(name, dtype, shape), kind)


def share_out(targets: Sequence[Target], rank: int, size: int) -> list[Target]:
    """The tensors that one of ``size`` processes merges: about the same number of bytes each."""
    loads = [0] * size
    mine: set[str] = set()
    for target in sorted(targets, key=lambda target: (-target.slot.bytes, target.slot.name)):
        lightest = loads.index(min(loads))
        loads[lightest] += target.slot.bytes
        if lightest == rank:
            mine.add(target.slot.name)
    return [target for target in targets if target.slot.name in mine]
