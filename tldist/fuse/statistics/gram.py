"""Inner products of what layers read: the inputs of every linear and convolution layer against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, unfold

from tldist.distributed import Team
from tldist.domain import Domain
from tldist.fuse.statistics.layers import UNCALLED, Plain, plain_layers, report_left_out
from tldist.fuse.statistics.walk import Walk, sum_over, walk_images
from tldist.models.load import input_tensor
from tldist.runtime.preprocess import Preprocessing
from tldist.training.ledger import Ledger

_PATCH_BYTES = 256 << 20
"""Of a convolution's unfolded input at once; one image may be more."""


@dataclass(frozen=True)
class Grams:
    """Of one model on one domain.

    Attributes:
        matrices: name of a weight tensor to ``X^T X / N`` of its layer's N inputs: float64 (D, D) on the CPU,
            or (groups, D, D) of a convolution with groups; D = C / groups * k * k of a convolution.
        left_out: names of the other parameters with two axes or more, and why: to be averaged.
    """

    matrices: dict[str, Tensor]
    left_out: dict[str, str]


@torch.no_grad()
def gram_matrices(
    model: nn.Module,
    how: Preprocessing,
    domain: Domain,
    team: Team,
    ledger: Ledger,
    *,
    walk: Walk,
    largest: int = 4608,
) -> Grams:
    """What `tldist.fuse.weights.informed.regmean` needs, eq. 2 of arXiv:2212.09849; labels are not read.

    Called by all processes together; the same for any number of them.

    Args:
        model: on the team's device; put into evaluation mode, else unchanged.
        how: its preprocessing.
        domain: the images.
        team: the processes.
        ledger: takes the broken images.
        walk: which images.
        largest: layers with wider inputs are left out; memory and time grow with its square and cube.

    Raises:
        DomainError: too many broken images, or none that can be decoded.
    """
    model.eval()
    layers = plain_layers(model)
    wide = {path: _width(layer) for path, layer in layers.found.items() if _width(layer) > largest}
    taken = {path: layer for path, layer in layers.found.items() if path not in wide}
    sums = {path: _zeros(layer, team.device) for path, layer in taken.items()}
    counts: Counter[str] = Counter()

    def take(path: str, inputs: Tensor) -> None:
        for gram, count in _gram_parts(taken[path], inputs):
            sums[path] += gram
            counts[path] += count

    with _reading(taken, take):
        for images, _ in walk_images(how, domain, team, ledger, walk, "inner products"):
            model(input_tensor(images, how))
    totals = sum_over(team, torch.tensor([counts[path] for path in taken], dtype=torch.float64)).tolist()
    matrices = {
        f"{path}.weight": _flat(sum_over(team, sums.pop(path)) / total)
        for path, total in zip(taken, totals)
        if total
    }
    reasons = {f"{path}.weight": reason for path, reason in layers.left_out.items()}
    reasons |= {f"{path}.weight": f"its inputs are more than {largest} wide" for path in wide}
    reasons |= {f"{path}.weight": UNCALLED for path, total in zip(taken, totals) if not total}
    other = "it is no linear or convolution layer's weight"
    left_out = {
        name: reasons.get(name, other)
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.dim() > 1 and name not in matrices
    }
    report_left_out("RegMean", left_out)
    return Grams(matrices, left_out)


def _groups(layer: Plain) -> int:
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def _width(layer: Plain) -> int:
    """Numbers that one output reads."""
    return layer.weight[0].numel()


def _zeros(layer: Plain, device: torch.device) -> Tensor:
    return torch.zeros(_groups(layer), _width(layer), _width(layer), dtype=torch.float64, device=device)


def _flat(gram: Tensor) -> Tensor:
    return gram[0] if len(gram) == 1 else gram


@contextmanager
def _reading(layers: dict[str, Plain], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While inside, ``take`` gets the path and the input of every call of a layer."""

    def note(path: str) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: tuple[Tensor, ...], named: dict[str, Any]) -> None:
            take(path, args[0] if args else named["input"])

        return layers[path].register_forward_pre_hook(hook, with_kwargs=True)

    handles = [note(path) for path in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gram_parts(layer: Plain, inputs: Tensor) -> Iterator[tuple[Tensor, int]]:
    """``X^T X`` (groups, D, D), in the input's type, and the number of rows of X, in one or more parts."""
    if isinstance(layer, nn.Linear):
        rows = inputs.reshape(-1, inputs.shape[-1])
        yield (rows.T @ rows)[None], len(rows)
        return
    images = inputs if inputs.dim() == 4 else inputs[None]
    for some in images.split(_images_at_once(layer, images)):
        patches = _patches(layer, some)
        yield patches @ patches.mT, patches.shape[2]


def _images_at_once(layer: nn.Conv2d, images: Tensor) -> int:
    places = images[0, 0].numel() // (layer.stride[0] * layer.stride[1])
    one = places * _width(layer) * layer.groups * images.element_size()
    return max(1, _PATCH_BYTES // max(1, one))


def _patches(layer: nn.Conv2d, images: Tensor) -> Tensor:
    """What each output place of a convolution reads: (groups, D, R), with D in the order of its weight."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = pad(images, layer._reversed_padding_repeated_twice, mode=mode)
    if layer.kernel_size == (1, 1):
        columns = padded[:, :, :: layer.stride[0], :: layer.stride[1]].flatten(2)
    else:
        columns = unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)
    count, _, places = columns.shape
    grouped = columns.view(count, layer.groups, -1, places)
    return grouped.permute(1, 2, 0, 3).reshape(layer.groups, -1, count * places)
