"""The frozen prefix computed once: its outputs for a domain, in a memory-mapped file that epochs read.

Shapes: V views of each of N images; the features of one image have the shape (...).
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tldist.data.augment import Augmentation
from tldist.data.loader import Batch, load_batches
from tldist.data.order import StepPlan, blocks_of
from tldist.distributed import Team
from tldist.domain import Domain
from tldist.errors import BundleError, Preempted
from tldist.files import canonical_json, read_json, sha256_text, sync, write_json
from tldist.models.load import hash_tensors
from tldist.progress import progress_bar
from tldist.runtime.preprocess import Preprocessing
from tldist.training.signals import StopFlag

META, FEATURES = "meta.json", "features.npy"
STORED: dict[str, type] = {"fp32": np.float32, "fp16": np.float16, "bf16": np.uint16}
"""How each number format lies on disk; NumPy has no bf16."""


@dataclass(frozen=True)
class CacheKey:
    """All that the cached numbers depend on."""

    prefix: str
    data: str
    preprocessing: dict[str, Any]
    views: int
    augmentation: dict[str, Any] | None
    seed: int
    numerics: str
    dtype: str

    @property
    def name(self) -> str:
        """The cache's folder name."""
        return sha256_text(canonical_json(asdict(self)))[:32]


def make_key(
    prefix: nn.Module,
    domain: Domain,
    how: Preprocessing,
    *,
    augmentation: Augmentation | None,
    views: int,
    seed: int,
    numerics: str,
    dtype: str,
) -> CacheKey:
    """The key of a prefix's features of a domain.

    Args:
        prefix: a traced part of a model (`tldist.models.split`): its code and its tensors count.
        domain, how: the images and their preprocessing.
        augmentation, views, seed: the V fixed augmented views; None: the one view of evaluation.
        numerics: what the prefix computes in.
        dtype: what the features are stored in.
    """
    code = str(getattr(prefix, "code", type(prefix).__name__))
    return CacheKey(
        prefix=sha256_text(code + hash_tensors(prefix.state_dict())),
        data=domain.fingerprint,
        preprocessing=how.to_dict(),
        views=views,
        augmentation=asdict(augmentation) if augmentation else None,
        seed=seed if augmentation else 0,
        numerics=numerics,
        dtype=dtype,
    )


@dataclass(frozen=True)
class FeatureCache:
    """Features on disk, read by position.

    Attributes:
        features: (V, N, ...) float32, float16, or uint16 holding bf16; memory-mapped.
        valid: bool (N,), False for broken images.
        broken: reasons by position.
        reused: whether an earlier run had computed them.
    """

    features: np.ndarray
    valid: np.ndarray
    broken: dict[int, str]
    reused: bool

    def read(self, view: int, indices: np.ndarray) -> Tensor:
        """float32 (len(indices), ...), in memory of its own."""
        rows = torch.from_numpy(np.array(self.features[view % len(self.features), indices]))
        return (rows.view(torch.bfloat16) if self.features.dtype == np.uint16 else rows).float()

    def batches(
        self, plans: Iterable[StepPlan] | Iterable[np.ndarray], labels: np.ndarray
    ) -> Iterator[Batch]:
        """What `load_batches` gives, with features in the place of images.

        Args:
            plans: steps (epoch e reads view e mod V) or arrays of positions (view 0).
            labels: int64 (N,).
        """
        for plan in plans:
            step = plan if isinstance(plan, StepPlan) else None
            indices = plan.indices if isinstance(plan, StepPlan) else plan
            filler = len(indices) == 0
            rows = np.zeros(1, dtype=np.int64) if filler else indices
            valid = self.valid[rows] & (not filler)
            broken = [(i, self.broken[i]) for i in rows.tolist() if i in self.broken] if self.broken else []
            yield Batch(
                self.read(step.epoch if step else 0, rows),
                torch.from_numpy(labels[rows]),
                torch.from_numpy(np.asarray(rows, dtype=np.int64)),
                torch.from_numpy(valid),
                broken,
                step,
            )


def default_folder() -> Path:
    """Where caches lie when nothing is said."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "tldist" / "features"


def cache_bytes(shape: tuple[int, ...], images: int, views: int, dtype: str) -> int:
    """Bytes on disk of a cache of features of one image's ``shape``."""
    return int(np.prod(shape)) * images * views * np.dtype(STORED[dtype]).itemsize


def open_cache(folder: Path, key: CacheKey) -> FeatureCache | None:
    """The finished cache of a key, if there is one."""
    path = folder / key.name
    if not (path / META).is_file():
        return None
    meta = read_json(path / META, BundleError, "feature cache")
    features = np.load(path / FEATURES, mmap_mode="r", allow_pickle=False)
    return _opened(features, meta, reused=True)


def _opened(features: np.ndarray, meta: dict[str, Any], reused: bool) -> FeatureCache:
    broken = {int(index): str(reason) for index, reason in meta["broken"].items()}
    valid = np.ones(features.shape[1], dtype=bool)
    valid[list(broken)] = False
    return FeatureCache(features, valid, broken, reused)


def fill_cache(
    folder: Path,
    key: CacheKey,
    compute: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    domain: Domain,
    how: Preprocessing,
    team: Team,
    *,
    augmentation: Augmentation | None,
    workers: int,
    batch_size: int = 64,
    label: str = "compute the frozen part once",
    stop: StopFlag | None = None,
) -> FeatureCache:
    """Compute the features of a domain on all processes; called by all together.

    The files are made beside and renamed when every process is done; where two runs make the same cache,
    each makes its own and one of the two equal ones stays.

    Args:
        folder: where caches lie.
        key: what is computed.
        compute: uint8 images (B, H, W, 3) on the device to features (B, ...).
        shape: of the features of one image.
        domain, how, team: as in `load_batches`.
        augmentation: of the views; None: the view of evaluation.
        workers: decoding processes.
        batch_size: images that one process handles at once.
        label: of the progress bar.
        stop: whether this process was asked to stop.

    Raises:
        Preempted: a process was asked to stop; nothing half-made stays.
    """
    full = (key.views, len(domain), *shape)
    stored = STORED[key.dtype]

    def begin() -> Path:
        _remove_abandoned(folder)
        path = folder / f".tmp-{uuid.uuid4().hex[:12]}-{key.name}"
        path.mkdir(parents=True)
        np.lib.format.open_memmap(path / FEATURES, mode="w+", dtype=stored, shape=full).flush()
        return path

    # Batches that each process has: in these all can ask each other.
    in_common = len(blocks_of(len(domain), batch_size, team.size - 1, team.size))
    temporary = team.on_main(begin)
    try:
        features = np.lib.format.open_memmap(temporary / FEATURES, mode="r+")
        broken: dict[int, str] = {}
        with progress_bar(key.views * len(domain), "img", label) as bar:
            for view in range(key.views):
                plans = [
                    StepPlan(0, view, len(rows), rows)
                    for rows in blocks_of(len(domain), batch_size, team.rank, team.size)
                ]
                loaded = load_batches(
                    domain, plans, how, augmentation=augmentation, seed=key.seed, workers=workers
                )
                for place, batch in enumerate(loaded):
                    if stop is not None and place < in_common and team.any(stop.requested):
                        raise Preempted(f"told to stop ({label}); it will start afresh")
                    broken.update(batch.broken)
                    features[view, batch.indices.numpy()] = _as_stored(
                        compute(batch.images.to(team.device)), stored
                    )
                    bar.update(len(batch.indices) * team.size)
        features.flush()
        found = {str(i): reason for part in team.gather(broken) for i, reason in sorted(part.items())}
        meta = {"key": asdict(key), "broken": found}
        team.on_main(lambda: _commit(temporary, folder / key.name, meta))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    done = np.load(folder / key.name / FEATURES, mmap_mode="r", allow_pickle=False)
    return _opened(done, meta, reused=False)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed runs left half-made; a day, because another run may be at work beside this one."""
    for leftover in folder.glob(".tmp-*"):
        if time.time() - leftover.stat().st_mtime > 86400:
            shutil.rmtree(leftover, ignore_errors=True)


def _as_stored(features: Tensor, stored: type) -> np.ndarray:
    if stored is np.uint16:
        return features.to(torch.bfloat16).cpu().view(torch.uint16).numpy()
    return features.float().cpu().numpy().astype(stored, copy=False)


def _commit(temporary: Path, target: Path, meta: dict[str, Any]) -> None:
    write_json(temporary / META, meta)
    if (target / META).is_file():  # another run was faster, with the same numbers
        shutil.rmtree(temporary)
        return
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    sync(target.parent)
