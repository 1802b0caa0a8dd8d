"""Several processes that merge into one folder; also where there is one, and no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tldist.files import atomic_folder
from tldist.fuse.weights.stream import write_merged
from tldist.fuse.weights.targets import Fusion, plan_targets
from tldist.process import core_count, keep_freed_memory
from tldist.progress import progress_bar


class Crew(Protocol):
    """The part of `tldist.distributed.Team` that a merge needs."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def local_size(self) -> int: ...

    def wait(self) -> None: ...

    def gather(self, value: Any) -> list[Any]: ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    def wait(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: Any) -> list[Any]:
        """The value alone."""
        return [value]


def merge_together(
    fusion: Fusion,
    out: Path,
    crew: Crew,
    *,
    metadata: dict[str, str] | None = None,
    shard_bytes: int | None = None,
    add: Callable[[Path], None] = lambda folder: None,
    label: str = "merge",
) -> int:
    """Merge models into a folder that is there whole or not at all; called by all processes together.

    Args:
        fusion: what is merged.
        out: the folder; on a file system that all processes see.
        crew: the processes.
        metadata, shard_bytes: see `write_merged`.
        add: puts more into the folder before it is moved to its place; called on the main process.
        label: of the progress bar.

    Returns:
        Bytes of the merged tensors.
    """
    keep_freed_memory()
    total = sum(target.slot.bytes for target in plan_targets(fusion))
    with _result_folder(out, crew) as folder, progress_bar(total, "B", label, keep=False, scale=True) as bar:
        write_merged(
            fusion,
            folder,
            metadata=metadata,
            shard_bytes=shard_bytes,
            rank=crew.rank,
            size=crew.size,
            together=crew.wait,
            threads=max(1, core_count() // crew.local_size),
            advance=lambda done: bar.update(done * crew.size),
        )
        if crew.rank == 0:
            add(folder)
    crew.wait()
    return total


@contextmanager
def _result_folder(path: Path, crew: Crew) -> Iterator[Path]:
    """The folder that becomes ``path`` when all processes are through; the main one makes and moves it."""
    if crew.rank == 0:
        with atomic_folder(path) as temporary:
            yield crew.gather(temporary)[0]
    else:
        yield crew.gather(None)[0]
