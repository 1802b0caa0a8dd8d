"""A domain in folders: one folder a class, optionally below train/, val/, test/."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from tldist.domain.index import SPLITS, WHOLE, Domain, natural_key, sort_names
from tldist.errors import DomainError
from tldist.runtime.decode import read_bytes

EXTENSIONS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


class FolderSource:
    """Image files below one folder, by relative path."""

    def __init__(self, root: Path, paths: list[str]) -> None:
        self.root, self.paths = root, paths

    def __len__(self) -> int:
        return len(self.paths)

    def id(self, row: int) -> str:
        return self.paths[row]

    def size(self, row: int) -> int:
        try:
            return (self.root / self.paths[row]).stat().st_size
        except OSError:
            return 0

    def read(self, row: int) -> bytes:
        return read_bytes(self.root / self.paths[row])


def open_folder(root: Path) -> Domain:
    """Index a folder of images.

    Raises:
        DomainError: no images, a class folder without images, images outside the class folders.
    """
    split_folders = {
        entry.name: SPLITS[entry.name.lower()] for entry in _folders(root) if entry.name.lower() in SPLITS
    }
    parts = split_folders or {"": WHOLE}
    _check_split_names(root, split_folders)
    paths: list[str] = []
    names: list[str | None] = []
    splits: list[str] = []
    for folder, split in sorted(parts.items()):
        for path, name in _images_below(root / folder):
            paths.append(f"{folder}/{path}" if folder else path)
            names.append(name)
            splits.append(split)
    if not paths:
        raise DomainError(
            f"{root}: no images found. Expected one folder of images a class, or train/ and val/ with such "
            f"folders ({', '.join(sorted(EXTENSIONS))})."
        )
    loose = sum(name is None for name in names)
    if loose and loose < len(names):
        stray = next(path for path, name in zip(paths, names) if name is None)
        raise DomainError(
            f"{root}: {loose} images lie outside the class folders, the first is {stray}. Move them into one."
        )
    classes = sort_names(name for name in names if name is not None)
    position = {name: place for place, name in enumerate(classes)}
    labels = np.array([-1 if name is None else position[name] for name in names], dtype=np.int32)
    return Domain(
        name=str(root),
        source=FolderSource(root, paths),
        rows=np.arange(len(paths), dtype=np.int64),
        labels=labels,
        classes=classes,
        splits=np.array(splits),
    )


def _check_split_names(root: Path, split_folders: dict[str, str]) -> None:
    """Two folders for one split (val/ and validation/) are a mistake; so are classes beside splits."""
    if len(set(split_folders.values())) < len(split_folders):
        raise DomainError(f"{root}: several folders for one split: {', '.join(sorted(split_folders))}.")
    others = [entry.name for entry in _folders(root) if entry.name not in split_folders]
    if split_folders and others:
        raise DomainError(
            f"{root}: the folder '{others[0]}' lies beside {', '.join(sorted(split_folders))}; "
            f"a domain has either splits or classes at its top. Move it, or open one split with data=."
        )


def _folders(root: Path) -> list[Path]:
    return [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _images_below(folder: Path) -> list[tuple[str, str | None]]:
    """(path relative to ``folder``, class name or None) of all images, in natural order."""
    found: list[tuple[str, str | None]] = []
    classes = sorted(_folders(folder), key=lambda entry: natural_key(entry.name))
    for class_folder in classes:
        images = _walk_images(class_folder)
        if not images:
            raise DomainError(
                f"{class_folder}: the class '{class_folder.name}' has no images. "
                f"Add some, or remove the folder."
            )
        found += [(f"{class_folder.name}/{path}", class_folder.name) for path in images]
    loose = sorted((e.name for e in folder.iterdir() if _is_image(e.name) and e.is_file()), key=natural_key)
    return found + [(name, None) for name in loose]


def _walk_images(folder: Path) -> list[str]:
    paths = []
    seen: set[str] = set()
    for current, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(current)
        if real in seen:  # a link that leads back up
            folders.clear()
            continue
        seen.add(real)
        relative = os.path.relpath(current, folder)
        prefix = "" if relative == "." else f"{relative.replace(os.sep, '/')}/"
        paths += [f"{prefix}{name}" for name in files if _is_image(name)]
    return sorted(paths, key=lambda path: (natural_key(path), path))


def _is_image(name: str) -> bool:
    return not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS
