"""Saving beside the training: the loop waits for a copy in memory, a thread waits for the disk."""

from __future__ import annotations

import copy
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from tldist.distributed import Team, whole
from tldist.training.checkpoint import AVERAGE, MODEL, OPTIMIZER, Position, retain, save_checkpoint
from tldist.training.optim import optimizer_tensors

State = dict[str, dict[str, Tensor]]


class Saver:
    """Writes checkpoints of one run, one at a time.

    Args:
        folder: where they lie.
        keep: newest checkpoints that stay, besides the best.
        frozen: names of tensors that never change: they are not saved, the run starts with them each time.
        team: the processes; all call together, the main one writes.
    """

    def __init__(self, folder: Path, keep: int, frozen: Collection[str], team: Team) -> None:
        self.folder, self.keep, self.frozen, self.team = folder, keep, frozenset(frozen), team
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._buffers: State = {}

    def save(
        self, model: nn.Module, optimizer: Optimizer, average: AveragedModel | None, position: Position
    ) -> None:
        """Copy the state and return; it is written meanwhile. An error of the save before is raised here.

        What is spread over processes is gathered, tensor by tensor: a checkpoint is the same whatever their
        number.
        """
        self.wait()
        state: State = {
            MODEL: self._moving(model.state_dict()),
            OPTIMIZER: optimizer_tensors(optimizer, model),
        }
        if average is not None:
            state[AVERAGE] = self._moving(average.state_dict())
        copies = {name: self._copy(name, tensors) for name, tensors in state.items()}
        if not self.team.is_main:
            return
        self._buffers = copies
        self._writing = self._thread.submit(self._write, self._buffers, copy.deepcopy(position))

    def wait(self) -> None:
        """Wait until what was saved is on disk; its error is raised here, on all processes."""
        writing, self._writing = self._writing, None
        self.team.on_main(lambda: writing.result() if writing is not None else None)

    def _moving(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: tensor for n, tensor in tensors.items() if n.removeprefix("module.") not in self.frozen}

    def _copy(self, name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy to the CPU, into the memory of the last save where it fits (fresh memory is slower)."""
        old = self._buffers.get(name, {})
        copies = {}
        for key, part in tensors.items():
            tensor = whole(part.detach())
            if not self.team.is_main:
                continue
            buffer = old.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
            copies[key] = buffer.copy_(tensor)
        return copies

    def _write(self, state: State, position: Position) -> None:
        save_checkpoint(self.folder, state, position)
        retain(self.folder, self.keep, position.best_step)
