"""Merging synthetic models: time and memory of whole processes, against mergekit-pytorch and ``cp``.

    python benchmarks/merge.py speed --mergekit PATH/TO/mergekit-pytorch
    python benchmarks/merge.py memory

``speed`` merges four fp32 models of 1 GB (60 tensors of 2048x2048) and a base; ``memory`` varies the size and
the number of models. Needs 8 (12) GB of disk in ``--work``, removed at the end. Inputs are in the page cache.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save_file

SIDE = 2048
LARGEST = SIDE * SIDE * 4
METHODS = {"average": "linear", "ties": "ties", "dare_ties": "dare_ties"}
DENSITY = 0.2


@dataclass(frozen=True)
class Run:
    """One process.

    Attributes:
        seconds: from start to end.
        resident: most bytes in memory, mapped files among them, as the system counts them from its start.
        anonymous: most bytes that no file backs.
        printed: its standard output.
    """

    seconds: float
    resident: int
    anonymous: int
    printed: str


def run(*command: str, cwd: Path | None = None) -> Run:
    """Run a command to its end; its memory is looked at every 5 ms."""
    os.sync()  # what the run before has left to write is not this one's
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=subprocess.STDOUT)
        peaks = [0, 0]
        watcher = threading.Thread(target=_watch, args=(child, peaks))
        watcher.start()
        child.wait()
        seconds = time.perf_counter() - begin
        watcher.join()
        output.seek(0)
        printed = output.read()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{printed[-2000:]}")
    return Run(seconds, peaks[0], peaks[1], printed)


def _watch(child: subprocess.Popen[str], peaks: list[int]) -> None:
    status = Path(f"/proc/{child.pid}/status")
    while child.returncode is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        for place, name in enumerate(("VmHWM", "RssAnon")):
            found = [int(line.split()[1]) * 1024 for line in lines if line.startswith(name)]
            peaks[place] = max(peaks[place], *found, 0)
        time.sleep(0.005)


def write_models(folder: Path, count: int, tensors: int) -> list[Path]:
    """Write a base and ``count`` models near it; the base last."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"layer.{n}.weight" for n in range(tensors)]
    random = np.random.default_rng(0)
    base = {name: random.standard_normal((SIDE, SIDE), dtype=np.float32) for name in names}
    files = []
    for number in range(count):
        random = np.random.default_rng(number + 1)
        noise = np.float32(0.05)
        model = {
            name: tensor + noise * random.standard_normal(tensor.shape, dtype=np.float32)
            for name, tensor in base.items()
        }
        files.append(folder / f"model{number}.safetensors")
        save_file(model, files[-1])
    save_file(base, folder / "base.safetensors")
    return [*files, folder / "base.safetensors"]


def with_tldist(files: list[Path], method: str, out: Path, *more: str) -> Run:
    """Merge all files but the last, which is the base."""
    shutil.rmtree(out, ignore_errors=True)
    base = [f"base={files[-1]}", f"density={DENSITY}"] if method != "average" else []
    models = [str(file) for file in files[:-1]]
    command = [sys.executable, "-m", "tldist", "fuse", *models, f"method={method}", "raw=true", f"out={out}"]
    return run(*command, *base, *more)


def with_mergekit(command: Path, files: list[Path], method: str, work: Path) -> Run:
    """The same with ``mergekit-pytorch``."""
    models = [{"model": str(f), "parameters": {"weight": 1.0, "density": DENSITY}} for f in files[:-1]]
    config: dict[str, object] = {"merge_method": METHODS[method], "models": models}
    if method == "average":
        config["models"] = [{"model": str(f), "parameters": {"weight": 1.0}} for f in files[:-1]]
    else:
        config["base_model"] = str(files[-1])
    (work / "merge.yaml").write_text(yaml.safe_dump(config))
    shutil.rmtree(work / "theirs", ignore_errors=True)
    return run(str(command), "merge.yaml", "theirs", cwd=work)


def middle(runs: list[Run]) -> Run:
    """The run with the median time."""
    order = sorted(runs, key=lambda found: found.seconds)
    return order[len(order) // 2]


def speed(work: Path, mergekit: Path | None, turns: int) -> None:
    """Print the table of times and memory."""
    files = write_models(work / "models", 4, 60)
    copy = _copy_seconds(files[:-1], work / "copies", turns, "")
    durable = _copy_seconds(files[:-1], work / "copies", turns, " && sync -f")
    print(f"cp of the four inputs: {copy:.2f} s, and until they are on the disk {durable:.2f} s\n")
    print(
        "| method | mergekit | tldist | ratio | merge alone | cp+sync / it | mergekit's memory | tldist's |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for method in METHODS:
        theirs = None
        if mergekit is not None:
            theirs = middle([with_mergekit(mergekit, files, method, work) for _ in range(max(1, turns // 3))])
        ours = middle([with_tldist(files, method, work / "ours") for _ in range(turns)])
        alone = _merge_seconds(
            middle([with_tldist(files, method, work / "ours", "hash=false") for _ in range(turns)])
        )
        shutil.rmtree(work / "ours")
        cells = [
            method,
            f"{theirs.seconds:.1f} s" if theirs else "not run",
            f"{ours.seconds:.2f} s",
            f"{theirs.seconds / ours.seconds:.1f}" if theirs else "",
            f"{alone:.2f} s",
            f"{durable / alone:.1f}",
            f"{theirs.resident / 1e9:.2f} GB ({theirs.anonymous / 1e9:.2f} anonymous)"
            if theirs
            else "not run",
            f"{ours.resident / 1e9:.3f} GB ({ours.anonymous / 1e9:.3f} anonymous)",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def _copy_seconds(files: list[Path], folder: Path, turns: int, then: str) -> float:
    """The median time to copy files, and of what is done ``then`` in that folder."""
    command = f"cp {' '.join(map(str, files))} {folder}{then and f'{then} {folder}'}"
    found = [run("sh", "-c", command) for _ in range(turns) if _empty(folder)]
    shutil.rmtree(folder)
    return statistics.median(run.seconds for run in found)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _merge_seconds(found: Run) -> float:
    """From the line that it prints: without start-up and hashing."""
    line = next(line for line in found.printed.splitlines() if " GB in " in line)
    return float(line.split(" GB in ")[1].split()[0])


def memory(work: Path) -> None:
    """Print most anonymous memory by size and number of models, in units of the largest tensor (16.8 MB)."""
    print("| models | size of each | average | ties |")
    print("| --- | --- | --- | --- |")
    for count, tensors in ((4, 15), (4, 30), (4, 60), (4, 120), (2, 30), (8, 30)):
        files = write_models(work / "models", count, tensors)
        cells = [str(count), f"{tensors * LARGEST / 1e9:.2f} GB"]
        for method in ("average", "ties"):
            found = with_tldist(files, method, work / "ours", "hash=false")
            cells.append(f"{found.anonymous / 1e6:.0f} MB ({found.anonymous / LARGEST:.1f})")
            shutil.rmtree(work / "ours")
        print("| " + " | ".join(cells) + " |", flush=True)
        shutil.rmtree(work / "models")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--mergekit", type=Path, help="the command mergekit-pytorch")
    parser.add_argument("--work", type=Path, help="a folder on a disk with room; a temporary one by default")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        if options.what == "speed":
            speed(Path(folder), options.mergekit, options.turns)
        else:
            memory(Path(folder))


if __name__ == "__main__":
    main()
