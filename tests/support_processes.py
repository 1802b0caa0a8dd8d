"""Real processes for tests: a function runs on every rank of a gloo job.

The ranks are forked from a server that has done the imports and nothing else (0.1 s each): PyTorch refuses
to go backward in a fork of a process that has gone backward before, as the process of the tests has.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.support import REPOSITORY


class RanksFailed(AssertionError):
    """Some ranks raised, or did not answer in time.

    Attributes:
        errors: rank to (name of the exception class, its text).
    """

    def __init__(self, message: str, errors: dict[int, tuple[str, str]]) -> None:
        super().__init__(message)
        self.errors = errors


def run_ranks(
    function: Callable[..., Any], ranks: int, *args: Any, timeout_seconds: float = 120
) -> list[Any]:
    """Call ``function(*args)`` on ``ranks`` processes that form one job; the results by rank.

    The function finds the environment of a launcher and joins the job itself, as a stage does, with
    `tldist.distributed.start`. It is a function of a module, its arguments and result can be pickled. The
    parent stays outside of the job.

    Raises:
        RanksFailed: with the traceback of every rank that raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tldist.finetune.run", "tldist.fuse.run", "tldist.align.run", __name__])
    with tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.pkl" for rank in range(ranks)]
        port = _free_port()
        workers = [
            context.Process(target=_work, args=(function, args, rank, ranks, port, results[rank]))
            for rank in range(ranks)
        ]
        for worker in workers:
            worker.start()
        _join(workers, timeout_seconds)
        found = [pickle.loads(path.read_bytes()) if path.is_file() else None for path in results]
    errors: dict[int, tuple[str, str]] = {}
    messages = []
    for rank, (answer, worker) in enumerate(zip(found, workers)):
        if answer is None:
            errors[rank] = ("NoAnswer", f"exit code {worker.exitcode}")
            messages.append(f"rank {rank} gave no answer (exit code {worker.exitcode})")
        elif not answer[0]:
            errors[rank] = answer[1][:2]
            messages.append(f"rank {rank}:\n{answer[1][2]}")
    if errors:
        raise RanksFailed("\n".join(messages), errors)
    return [answer[1] for answer in found]


def _work(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, ranks: int, port: int, result: Path
) -> None:
    import torch
    from accelerate.state import AcceleratorState, PartialState

    from tldist import distributed

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)  # what the parent's tests left behind
    PartialState._reset_state()
    try:
        answer: tuple[bool, Any] = (True, function(*args))
    except BaseException as error:
        answer = (False, (type(error).__name__, str(error), traceback.format_exc()))
    temporary = result.with_suffix(".tmp")
    temporary.write_bytes(pickle.dumps(answer))
    temporary.replace(result)
    if not answer[0]:
        raise SystemExit(1)  # without the end of the job: its peers are to see that this rank is gone
    distributed.end()


def _join(workers: list[Any], timeout_seconds: float) -> None:
    """Wait for all; where one fails, the others get ten seconds to notice."""
    until = time.monotonic() + timeout_seconds
    while any(worker.is_alive() for worker in workers) and time.monotonic() < until:
        workers[0].join(0.02)
        if any(worker.exitcode not in (None, 0) for worker in workers):
            until = min(until, time.monotonic() + 10)
        time.sleep(0.01)
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        worker.join()


def start_ranks(command: Sequence[str], ranks: int, **environment: str) -> list[subprocess.Popen[str]]:
    """Start a command as the ranks of one job, each in a process group of its own, as a launcher does.

    An environment value with ``{rank}`` in it gets each rank's number.
    """
    port = str(_free_port())
    return [
        subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env={
                **os.environ,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
                **{name: value.replace("{rank}", str(rank)) for name, value in environment.items()},
            },
            text=True,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
