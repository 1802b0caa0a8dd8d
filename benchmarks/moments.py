"""Covariance alignment of features in Parquet shards: time, against reading and a dsyrk a batch; memory.

    python benchmarks/moments.py [--features 1000000] [--width 512] [--folder DIR] [--turns 3]

Half of the shards are the source, half the target. In turns, each in a process of its own with one thread:
reading the shards alone; one float64 ``dsyrk`` a batch alone, of a batch that lies in memory; both domains'
moments from the shards, and CORAL on them; the same by two processes, which share the shards and add up
their moments. Start-up (imports, joining the job) is not counted. Memory is the highest resident size above
that of the interpreter with torch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import machine
from scipy.linalg.blas import dsyrk

from tldist import distributed
from tldist.align.methods import coral
from tldist.features.moments import gather_moments, moments_of
from tldist.features.vectors import vector_batches

ROWS, SHARD = 8192, 65_536


def write_shards(folder: Path, features: int, width: int) -> list[str]:
    """Shards as ``tldist embed`` writes them, an even number."""
    random = np.random.default_rng(0)
    mix = random.normal(size=(width, width)).astype(np.float32) / width**0.5
    shards = max(2, -(-features // SHARD) // 2 * 2)
    files = []
    for number, count in enumerate(np.diff(np.linspace(0, features, shards + 1).astype(int)).tolist()):
        values = random.standard_normal((count, width), dtype=np.float32) @ mix + 0.5
        lists = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width)
        ids = pa.array([f"{number}-{row}" for row in range(count)])
        files.append(str(folder / f"part-{number:05d}.parquet"))
        pq.write_table(
            pa.table({"id": ids, "embedding": lists}), files[-1], compression="NONE", row_group_size=ROWS,
            use_dictionary=False,
        )  # fmt: skip
    return files


def read(files: list[str]) -> None:
    """Nothing but that."""
    for _ in vector_batches(files, rows=ROWS):
        pass


def multiply(files: list[str]) -> None:
    """One dsyrk a batch, of a batch in memory."""
    batches = [len(batch) for batch in vector_batches(files, rows=ROWS)]
    width = next(vector_batches(files, rows=1)).shape[1]
    values = np.random.default_rng(0).normal(size=(ROWS, width))
    result = np.zeros((width, width), order="F")
    begin = time.perf_counter()
    for count in batches:
        dsyrk(1.0, values[:count].T, beta=1.0, c=result, overwrite_c=1, lower=1)
    print(json.dumps({"seconds": time.perf_counter() - begin}))


def align(files: list[str]) -> None:
    """Moments of both domains over all processes, and the map."""
    team = distributed.start()
    half = len(files) // 2
    found = []
    for domain in (files[:half], files[half:]):
        mine = moments_of(vector_batches(domain, rows=ROWS, rank=team.rank, size=team.size))
        found.append(gather_moments(mine, team))
    if team.is_main:
        assert found[0] is not None
        assert found[1] is not None
        coral(found[0], found[1])


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Peak(threading.Thread):
    """The highest resident size from now on, looked at a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.value = resident_bytes()
        self.start()

    def run(self) -> None:
        """Look."""
        while True:
            self.value = max(self.value, resident_bytes())
            time.sleep(0.01)


WORK: dict[str, Callable[[list[str]], None]] = {"read": read, "multiply": multiply, "align": align}


def child(name: str, files: list[str]) -> None:
    """Do one thing and print its seconds and its memory in MB."""
    torch.set_num_threads(1)
    if name == "align":
        distributed.start().wait()
    before = resident_bytes()
    peak = Peak()
    begin = time.perf_counter()
    WORK[name](files)
    seconds = time.perf_counter() - begin
    memory = (peak.value - before) / 1e6
    if name != "multiply":
        print(json.dumps({"seconds": seconds, "memory": memory}))
    if name == "align":
        distributed.end()


def measure(name: str, files: list[str], processes: int = 1) -> dict[str, float]:
    """The slowest process's seconds, and the largest one's memory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    job = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(processes),
        "CUDA_VISIBLE_DEVICES": "",
    }
    workers = []
    for rank in range(processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes), **job}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(ranks if processes > 1 else {})}
        command = [sys.executable, __file__, "--child", name, *files]
        workers.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    lines = [worker.communicate()[0].strip().splitlines()[-1] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"{name} failed")
    found = [json.loads(line) for line in lines]
    return {key: max(each[key] for each in found) for key in found[0]}


def main() -> None:
    """Write shards, measure in turns, print."""
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the shards are written for a while")
    given = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        files = write_shards(Path(folder), given.features, given.width)
        turns = []
        for _ in range(given.turns):
            turn = {name: measure(name, files) for name in ("read", "multiply", "align")}
            turns.append({**turn, "two": measure("align", files, processes=2)})
    middle = {name: statistics.median(turn[name]["seconds"] for turn in turns) for name in turns[0]}
    bound = [
        turn["align"]["seconds"] / (turn["read"]["seconds"] + turn["multiply"]["seconds"]) for turn in turns
    ]
    two = [turn["align"]["seconds"] / turn["two"]["seconds"] for turn in turns]
    ratio, speedup = statistics.median(bound), statistics.median(two)
    print(
        f"{given.features:,} features of {given.width} dimensions in {len(files)} shards, {given.turns} turns"
    )
    print(f"reading {middle['read']:.2f} s, a dsyrk a batch {middle['multiply']:.2f} s")
    print(f"alignment {middle['align']:.2f} s: {ratio:.3f} of both (each {_list(bound)})")
    print(f"by two processes {middle['two']:.2f} s: {speedup:.2f} times as fast (each {_list(two)})")
    print(f"memory above the start {max(turn['align']['memory'] for turn in turns):.0f} MB")


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


if __name__ == "__main__":
    main()
