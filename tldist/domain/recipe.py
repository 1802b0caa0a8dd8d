"""The settings of a domain: where its images and labels are, and which part of it is meant."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from tldist.recipe import Free, Recipe


class DataRecipe(Recipe):
    """A domain: a folder of images, or Parquet files."""

    shorthand: ClassVar[str] = "path"

    path: Free[str]
    """Folder with a folder of images a class (optionally below train/, val/, test/), or a Parquet file or
    glob. It may move between two starts: the content is what identifies it."""
    also: Free[tuple[str, ...]] = ()
    """More of them, joined to it as one domain (several sources): their classes are matched by name."""
    split: str | None = None
    """Only this split (train, val or test); none: the one that the stage takes by itself."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many images of each split, spread over the classes; the same ones each time."""
    image_column: str = "image"
    """Parquet: the column with the image: bytes, a path relative to the file, or a struct of both."""
    label_column: str = "label"
    """Parquet: the column with the class, a name or a number; without it the domain has no labels."""
    id_column: str = "id"
    """Parquet: the column with a unique name for each row; without it, file name and row number."""
    split_column: str = "split"
    """Parquet: the column with the split; without it, file names that start with train, val or test."""
    max_bad: float = Field(default=0.01, ge=0, le=1)
    """The share of images that may be broken before the stage stops; up to it they are skipped and listed."""
