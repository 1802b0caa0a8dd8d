"""How the cores of a machine without a GPU are shared between training and decoding.

OpenMP's threads wait for each other in every layer: one of them that shares its core with a decoding process
holds up all. Where decoding keeps cores busy, training is faster on the others alone (measured on two cores,
one of them decoding: 130 images/s against 66).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tldist.distributed import Team
from tldist.domain import Domain
from tldist.runtime.decode import BadImage

_BYTES_PER_SECOND = 60e6
"""Of JPEG files that one core decodes and resizes."""
_OPERATIONS_PER_SECOND = 60e9
"""Of one core in training; small networks reach less, large ones more."""
_SAMPLE = 16


@contextmanager
def own_threads() -> Iterator[None]:
    """Put the number of threads back that it was before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def settle_threads(team: Team, model: nn.Module, size: tuple[int, int], domain: Domain, workers: int) -> int:
    """Threads that training shall take beside this process's decoding processes.

    Args:
        team: the processes, and the device.
        model: what learns, on it.
        size: height and width of its input.
        domain: what is decoded.
        workers: decoding processes.
    """
    cores = torch.get_num_threads()
    if team.device.type != "cpu" or workers == 0 or cores == 1:
        return cores
    operations = count_operations(model, torch.zeros(1, 3, *size))
    return threads_for_training(cores, workers, mean_image_bytes(domain), operations)


def threads_for_training(cores: int, workers: int, image_bytes: float, operations: float) -> int:
    """Threads that training shall take, by an estimate alone: the same each time.

    Args:
        cores: of this process.
        workers: decoding processes beside it.
        image_bytes: mean size of an image file.
        operations: of a training step, an image.
    """
    decoding, training = image_bytes / _BYTES_PER_SECOND, operations / _OPERATIONS_PER_SECOND
    busy = round(cores * decoding / max(decoding + training, 1e-12))
    return max(1, cores - min(workers, busy))


def mean_image_bytes(domain: Domain) -> float:
    """Of a few images, spread over the domain."""
    sizes = []
    for index in np.linspace(0, len(domain) - 1, min(_SAMPLE, len(domain))).astype(int).tolist():
        try:
            sizes.append(len(domain.read(index)))
        except BadImage:
            continue
    return float(np.mean(sizes)) if sizes else 0.0


@torch.no_grad()
def count_operations(model: nn.Module, example: Tensor) -> int:
    """Floating-point operations of a training step on an example: the forward pass, and twice that back."""
    with FlopCounterMode(display=False) as counter:
        model.eval()(example)
    return 3 * counter.get_total_flops()
