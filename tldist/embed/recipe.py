"""The settings of ``tldist embed``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tldist.domain.recipe import DataRecipe
from tldist.recipe import Free, Recipe


class EmbedRecipe(Recipe):
    """Turn a domain into shards of vectors, or check a folder of them."""

    inputs: ClassVar[tuple[str, ...]] = ("model",)

    model: Free[str | None] = None
    """A bundle or a run (computed with PyTorch), or a package with features (ONNX Runtime, no torch). It may
    move between two starts: what it computes identifies it."""
    data: DataRecipe | None = None
    """The images: all splits, unless data.split is given."""
    out: Free[Path]
    """The folder of vectors: one part-*.parquet a unit, with its record in units/. The same command, on any
    number of processes, does what is missing."""
    unit_rows: int = Field(default=2048, ge=1)
    """Images in one unit: what is done whole or not at all, and lies in one Parquet file."""
    batch_size: int = Field(default=64, ge=1)
    """Images that a process gives to the model at once; the last batch of a unit is filled up."""
    dtype: Literal["float32", "float16"] = "float32"
    """Of the stored vectors."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which a bundle computes; a package computes in the precision that it was exported with."""
    workers: Free[int | None] = Field(default=None, ge=1)
    """Threads that decode images in each process; none: the cores of this host, shared by its processes."""
    verify: Free[bool] = False
    """Only check the folder: row counts and SHA-256 of every unit. Exit code 1 where something differs."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""

    @model_validator(mode="before")
    @classmethod
    def _folder_as_input(cls, values: Any) -> Any:
        """`tldist embed DIR verify=true`: where there is only a folder to check, the input is that folder."""
        if not isinstance(values, dict) or "out" in values or not values.get("model"):
            return values
        if str(values.get("verify", "")).lower() not in ("true", "1", "yes"):
            return values
        return {**{name: value for name, value in values.items() if name != "model"}, "out": values["model"]}

    @model_validator(mode="after")
    def _check_complete(self) -> Self:
        missing = [name for name in ("model", "data") if getattr(self, name) is None]
        if missing and not self.verify:
            raise ValueError(
                f"the setting '{missing[0]}' is missing: tldist embed MODEL data=D out=DIR "
                f"(only verify=true does without)"
            )
        return self
