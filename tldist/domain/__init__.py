"""A domain as an index of samples, whatever it is stored in."""

from __future__ import annotations

import glob
from dataclasses import replace
from pathlib import Path

from tldist.domain.folder import open_folder
from tldist.domain.index import Domain, natural_key, sort_names
from tldist.domain.join import join
from tldist.domain.parquet import open_parquet
from tldist.domain.recipe import DataRecipe
from tldist.domain.seal import seal
from tldist.errors import DomainError

__all__ = ["DataRecipe", "Domain", "join", "natural_key", "open_domain", "seal", "sort_names"]


def open_domain(data: DataRecipe | str | Path, *, sealed: bool = False) -> Domain:
    """Open a domain: a folder of images, or a Parquet file, glob or folder.

    Args:
        data: the settings, or just the path.
        sealed: give a view without labels (see `seal`); ``limit`` then does not spread over the classes.

    Returns:
        The index of its samples, narrowed to ``split`` and ``limit``.

    Raises:
        DomainError: it is not there, empty, or inconsistent.
    """
    recipe = data if isinstance(data, DataRecipe) else DataRecipe.make(path=str(data))
    parts = [_open(recipe), *(_open(recipe.replace(path=path, also=())) for path in recipe.also)]
    domain = replace(join(parts) if recipe.also else parts[0], max_bad=recipe.max_bad)
    if sealed:
        domain = seal(domain)
    if recipe.split is not None:
        domain = domain.split(recipe.split)
    return domain.limited(recipe.limit)


def _open(recipe: DataRecipe) -> Domain:
    if "://" in recipe.path:
        raise DomainError(f"{recipe.path}: remote data sets are not supported yet; copy it to a disk first.")
    path = Path(recipe.path)
    if path.is_dir():
        files = sorted(path.glob("*.parquet"), key=lambda file: natural_key(file.name))
        return open_parquet(files, recipe) if files else open_folder(path)
    matches = [path] if path.is_file() else [Path(name) for name in glob.glob(recipe.path, recursive=True)]  # noqa: PTH207 - the pattern may be absolute
    files = sorted(
        (match for match in matches if match.suffix == ".parquet"), key=lambda file: natural_key(str(file))
    )
    if files:
        return open_parquet(files, recipe)
    if path.exists():
        raise DomainError(f"{path}: expected a folder of images or a .parquet file.")
    raise DomainError(f"{path}: no such folder or file. data= takes a folder of images, or Parquet files.")
