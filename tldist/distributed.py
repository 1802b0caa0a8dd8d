"""The one room that knows Accelerate's start, ranks, reductions and the end."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    PartialState,
)
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tldist import __version__
from tldist.errors import MachineError, TldistError
from tldist.files import canonical_json
from tldist.process import keep_freed_memory
from tldist.recipe import Recipe, fixed_values

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T")

_TIMEOUT_SECONDS = 600
_MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True)
class Team:
    """The processes of this job, as one of them sees it.

    Attributes:
        rank: this process, 0 .. size - 1.
        size: number of processes.
        local_size: processes on this host.
        device: where this process computes.
        shards: whether weights, gradients and optimiser state are spread over the processes (FSDP2) in the
            place of being copied to each (DDP).
    """

    rank: int
    size: int
    local_size: int
    device: torch.device
    shards: bool = False

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def accelerator(self, precision: Precision, **options: Any) -> Accelerator:
        """Accelerate for one stage. A second stage in the same process may ask for another precision."""
        check_precision(precision, self.device)
        AcceleratorState._reset_state(reset_partial_state=False)
        ddp = DistributedDataParallelKwargs(**options)
        fsdp = None
        if self.shards:
            # An Accelerator before this one has written FSDP there, which the next does not start from.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            # Each process has read the weights anyway; and Accelerate 1.15 fails on a parameter of the root.
            fsdp = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
            fsdp.auto_wrap_policy = None  # `shard_units` has wrapped the blocks
        accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision=_MIXED[precision],
            kwargs_handlers=[ddp],
            fsdp_plugin=fsdp,
        )
        if fsdp is not None:
            # Autocast makes the numbers those of DDP; FSDP's own policy would cast the parameters of
            # BatchNorm and not its statistics, and fail.
            fsdp.mixed_precision_policy = None
        return accelerator

    def shard_units(self, accelerator: Accelerator, modules: Iterable[torch.nn.Module]) -> None:
        """Make each module a unit that is gathered, used and let go as one, before Accelerate prepares the
        rest."""
        plugin = accelerator.state.fsdp_plugin
        offload = CPUOffloadPolicy() if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else OffloadPolicy()
        for module in modules:
            if not isinstance(module, FSDPModule):
                fully_shard(
                    module, reshard_after_forward=plugin.reshard_after_forward, offload_policy=offload
                )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor([flag], dtype=torch.float32, device=self.device)) > 0)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank. For small Python data (it is serialised)."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, by rank; each may have another number of them, also none.

        Gradients come back to a process's own rows alone, without a word to the others: it is for what all
        processes compute alike from all rows, whose gradient each of them has whole.

        Args:
            rows: (N, ...) on the team's device; the same shape but for N on all processes.
        """
        if self.size == 1:
            return rows
        gathered: torch.Tensor = _GatheredRows.apply(rows, self)
        return gathered

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main process do something and give its result to all; its error is raised on all."""
        if self.size == 1:
            return work()
        box: list[Any] = [None, None]
        error: BaseException | None = None
        if self.is_main:
            try:
                box[0] = work()
            except Exception as problem:
                error = problem
                box[1] = (type(problem).__name__, str(problem), getattr(problem, "exit_code", None))
        dist.broadcast_object_list(box, src=0)
        if error is not None:
            raise error
        if box[1] is not None:
            name, message, code = box[1]
            raise StoppedByMain(f"{name}: {message}", code)
        result: T = box[0]
        return result

    def same_everywhere(self, what: str, value: str) -> None:
        """Refuse to go on where a value differs between processes (recipe, data, model).

        Raises:
            MachineError: names the ranks that differ.
        """
        values = self.gather((value, platform.node()))
        odd = [f"rank {rank} on {host}" for rank, (other, host) in enumerate(values) if other != values[0][0]]
        if odd:
            raise MachineError(f"{what} differs between processes: {', '.join(odd)} against rank 0.")

    def agree(self, recipe: Recipe, inputs: Mapping[str, str]) -> None:
        """Refuse to start a job whose processes run other code, or were given other settings or inputs.

        Args:
            recipe: the settings.
            inputs: fingerprints of data and models.

        Raises:
            MachineError: names what differs, and where.
        """
        self.same_everywhere("the version of tldist", __version__)
        self.same_everywhere("the recipe", canonical_json(fixed_values(recipe)))
        for name, value in inputs.items():
            self.same_everywhere(f"the {name}", value)

    def same_buffers(self, model: torch.nn.Module) -> None:
        """Give all processes the main one's buffers (the BatchNorm statistics that are saved)."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


class _GatheredRows(torch.autograd.Function):
    """See `Team.gather_rows`."""

    @staticmethod
    def forward(context: Any, rows: torch.Tensor, team: Team) -> torch.Tensor:
        counts = torch.zeros(team.size, dtype=torch.int64, device=rows.device)
        counts[team.rank] = len(rows)
        sizes = team.sum(counts).tolist()
        context.start, context.count = sum(sizes[: team.rank]), len(rows)
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # the collective wants equal shapes
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(team.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes)])

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[context.start : context.start + context.count], None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as one, gathered where it is spread over processes: then all of them call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The opposite: a whole tensor, the same on all processes, spread as another one of its shape is."""
    if not isinstance(other, DTensor) or tensor.shape != other.shape:
        return tensor
    return distribute_tensor(tensor, other.device_mesh, other.placements)


class StoppedByMain(TldistError):
    """The main process failed; it has said why, the others only stop."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code or 1


def start() -> Team:
    """Join the job that the launcher started, or be alone.

    Raises:
        MachineError: the launcher started fewer processes than it was asked for, or promises what it
            cannot give here (FSDP of version 1, or without a device that has it).
    """
    _check_launcher()
    shards = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    has_gpu = torch.cuda.is_available()
    if not PartialState._shared_state:
        timeout = datetime.timedelta(seconds=int(os.environ.get("TLDIST_TIMEOUT_SECONDS", _TIMEOUT_SECONDS)))
        PartialState(cpu=not has_gpu, timeout=timeout)
        if not has_gpu:
            keep_freed_memory()
    state = PartialState()
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != expected:
        raise MachineError(
            f"the launcher promised {expected} processes, but Accelerate formed a job of "
            f"{state.num_processes}. Start it with: {_right_command(expected)}"
        )
    if shards:
        _check_fsdp(state)
    return Team(
        rank=state.process_index,
        size=state.num_processes,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)),
        device=state.device,
        shards=shards,
    )


def end(*, together: bool = False) -> None:
    """Leave the job; safe to call alone and twice.

    Args:
        together: wait for the others first: all is well, and none shall lose its peers while it finishes.
    """
    if dist.is_available() and dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse what would be pretended: Accelerate trains fp16 on a CPU silently in fp32."""
    if precision == "fp16" and device.type == "cpu":
        raise MachineError(
            "precision=fp16 needs a GPU: on a CPU Accelerate would silently train in fp32. "
            "Use precision=bf16, fp32 or auto."
        )
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise MachineError("precision=bf16 is not supported by this GPU. Use precision=fp16 or fp32.")


def launcher_precision() -> Precision | None:
    """The mixed precision that the launcher's configuration asks for, if it asks."""
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return asked if asked in ("bf16", "fp16") else None  # type: ignore[return-value]


def _check_launcher() -> None:
    environment = os.environ
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    if launched and "MASTER_ADDR" in environment and "WORLD_SIZE" not in environment:
        # accelerate's simple launcher, which a CPU configuration selects, sets the address of a job of
        # several processes and then starts one.
        raise MachineError(
            "accelerate launch was asked for several processes and started one (it does so for --cpu and "
            f"for distributed_type MULTI_CPU). Start it with: {_right_command(2)}"
        )


def _check_fsdp(state: PartialState) -> None:
    """Refuse what Accelerate would silently make something else of."""
    if state.device.type == "cpu" and state.distributed_type != DistributedType.MULTI_GPU:
        raise MachineError(
            "FSDP needs a GPU: on a CPU Accelerate would silently run plain DDP. Start it with: "
            f"{_right_command(state.num_processes)}"
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise MachineError("the launcher asks for FSDP of version 1. Set fsdp_version: 2 in its fsdp_config.")
    if state.num_processes == 1:
        raise MachineError("FSDP spreads a model over several processes, and this job has one. Start more.")


def _right_command(processes: int) -> str:
    return f"accelerate launch --multi_gpu --num_processes {processes} -m tldist ..."
