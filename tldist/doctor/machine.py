"""This machine: cores, memory, disk, GPUs."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
from pathlib import Path

from tldist.doctor.finding import Check, Finding
from tldist.process import core_count

_GIB = 2**30
_LITTLE_DISK = 2 * _GIB
_LITTLE_SHARED_MEMORY = 256 * 2**20


def check_machine(folder: Path) -> Check:
    """Look at the machine.

    Args:
        folder: where runs would be written; its free space is what counts.
    """
    cores = core_count()
    memory, free = memory_bytes(), shutil.disk_usage(folder).free
    gpus = list_gpus()
    facts = {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": cores,
        "memory_bytes": memory,
        "free_bytes": free,
        "gpus": gpus,
    }
    words = f"{memory / _GIB:.1f} GiB of memory, " if memory else ""
    lines = (
        f"Python {facts['python']} on {facts['system']}, host {facts['host']}",
        f"{cores} cores, {words}{free / _GIB:.1f} GiB free in {folder.resolve()}",
        f"GPUs: {', '.join(gpus) or 'none'}",
    )
    findings = [*_check_space(folder, free), *_check_torch_sees(gpus)]
    return Check(facts, lines, tuple(findings))


def memory_bytes() -> int | None:
    """The memory that this process may use: the machine's, or its control group's limit if less."""
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(name)
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits, default=None)


def list_gpus() -> list[str]:
    """Names of the NVIDIA GPUs, as the driver's own tool tells them (no torch needed)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [line.strip() for line in answer.stdout.splitlines() if line.strip()]
        if answer.returncode == 0
        else []
    )


def _check_space(folder: Path, free: int) -> list[Finding]:
    found = []
    if free < _LITTLE_DISK:
        what = (
            f"only {free / _GIB:.1f} GiB are free in {folder.resolve()}; a run with checkpoints can need more"
        )
        found.append(Finding("note", what, "free some space, or point out= to another disk"))
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).total < _LITTLE_SHARED_MEMORY:
        size = shutil.disk_usage(shared).total / 2**20
        what = f"/dev/shm has {size:.0f} MiB: decoding workers hand their batches over there and may crash"
        found.append(Finding("note", what, "start the container with --shm-size=2g, or give workers=0"))
    return found


def _check_torch_sees(gpus: list[str]) -> list[Finding]:
    if not gpus or importlib.util.find_spec("torch") is None:
        return []
    try:
        import torch
    except Exception:  # reported by the check of the libraries
        return []
    if torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        what, todo = "the torch installed is built for CPUs", "install torch's CUDA build (see pytorch.org)"
    else:
        what = f"torch (CUDA {torch.version.cuda}) cannot use the driver"
        todo = "update the NVIDIA driver, or install a torch built for an older CUDA"
    return [Finding("broken", f"this machine has a GPU, but {what}", todo)]
