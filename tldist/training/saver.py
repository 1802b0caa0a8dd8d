"""Saving beside the training: a thread copies while the next gradient is computed, and writes."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from tldist.distributed import Team, whole
from tldist.training.checkpoint import (
    AUXILIARY,
    AVERAGE,
    MODEL,
    OPTIMIZER,
    Position,
    retain,
    save_checkpoint,
)
from tldist.training.optim import optimizer_tensors

State = dict[str, dict[str, Tensor]]


class Saver:
    """Writes checkpoints of one run, one at a time.

    Args:
        folder: where they lie.
        keep: newest checkpoints that stay, besides the best.
        frozen: names of tensors that never change: they are not saved, the run starts with them each time.
        team: the processes; all call together, the main one writes.
        candidates: steps whose checkpoints stay too.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        frozen: Collection[str],
        team: Team,
        candidates: Collection[int] = (),
    ) -> None:
        self.folder, self.keep, self.frozen, self.team = folder, keep, frozenset(frozen), team
        self.candidates = frozenset(candidates)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._memory: State = {}

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        average: AveragedModel | None,
        position: Position,
        auxiliary: nn.Module | None = None,
    ) -> None:
        """Take the state of now and return; it is copied and written meanwhile.

        What the next forward pass changes (buffers) is copied at once, the rest until `settle`. What is
        spread over processes is gathered at once, tensor by tensor: a checkpoint does not know their number.

        Raises:
            Exception: an error of the save before, on all processes.
        """
        self.wait()
        state: State = {
            MODEL: self._moving(model.state_dict()),
            OPTIMIZER: optimizer_tensors(optimizer, model, auxiliary),
        }
        if auxiliary is not None:
            state[AUXILIARY] = auxiliary.state_dict()
        if average is not None:
            state[AVERAGE] = self._moving(average.state_dict())
        buffers = {name for name, _ in model.named_buffers()}
        later: list[tuple[Tensor, Tensor]] = []
        for file, tensors in state.items():
            for name, tensor in tensors.items():
                part = tensor.detach()
                full = whole(part)
                if self.team.is_main:
                    memory = self._room(file, name, full)
                    if full is not part or name in buffers:
                        memory.copy_(full)
                    else:
                        later.append((memory, full))
        if not self.team.is_main:
            return
        ready = {
            file: {name: self._memory[file][name] for name in tensors} for file, tensors in state.items()
        }
        self._copied.clear()
        self._writing = self._thread.submit(self._write, ready, later, copy.deepcopy(position))

    def settle(self) -> None:
        """Wait until the state of the last save is copied: from then on it may change."""
        self._copied.wait()

    def wait(self) -> None:
        """Wait until what was saved is on disk; its error is raised here, on all processes."""
        writing, self._writing = self._writing, None
        self.team.on_main(lambda: writing.result() if writing is not None else None)

    def _moving(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: tensor for n, tensor in tensors.items() if n.removeprefix("module.") not in self.frozen}

    def _room(self, file: str, name: str, tensor: Tensor) -> Tensor:
        """Memory on the CPU for a tensor: that of the last save where it fits (fresh memory is slower)."""
        rooms = self._memory.setdefault(file, {})
        room = rooms.get(name)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = rooms[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return room

    def _write(self, state: State, later: list[tuple[Tensor, Tensor]], position: Position) -> None:
        try:
            for memory, tensor in later:
                memory.copy_(tensor)
        finally:
            self._copied.set()
        save_checkpoint(self.folder, state, position)
        retain(self.folder, self.keep, position.best_step, self.candidates)
