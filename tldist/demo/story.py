"""The story: what is trained on what, and with which settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tldist.demo.domains import SIDE, STYLES
from tldist.demo.recipe import DemoRecipe

MODEL = "resnet18"
UNADAPTED = "printed digits only"
FUSED_ONLY = "sources fused"
ALIGNED = "features aligned (CORAL)"
SCRATCH = "from scratch"
PROBE = "frozen features, linear probe"
ONE_SOURCE = "one source, fine-tuned"
FUSED = "sources fused, fine-tuned"
WITHOUT_LABELS = (UNADAPTED, FUSED_ONLY, ALIGNED)
"""The methods that see no label of the target."""


@dataclass(frozen=True)
class Effort:
    """How long things are trained.

    Attributes:
        base: epochs on the pooled sources.
        source: epochs on each source.
        target: epochs on the labelled target images.
    """

    base: int = 4
    source: int = 2
    target: int = 12


QUICK = Effort(1, 1, 1)


@dataclass(frozen=True)
class Story:
    """Where the runs of one demo lie, and the settings of its trainings."""

    recipe: DemoRecipe

    @property
    def effort(self) -> Effort:
        """How long things are trained."""
        return QUICK if self.recipe.quick else Effort()

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the source domains."""
        return tuple(STYLES)

    def domain(self, name: str) -> Path:
        """The folder of a domain."""
        return self.recipe.out / "domains" / name

    def target(self, draw: int) -> Path:
        """The target domain with one draw of its labelled images."""
        return self.domain(f"target-{draw}")

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.recipe.out / name

    def bundle(self, name: str) -> Path:
        """The model that a run made."""
        return self.run(name) / "bundle"

    def base(self) -> dict[str, Any]:
        """Training on the pooled sources, from random weights."""
        return {
            "data": self.domain("pool"),
            "model": MODEL,
            "weights": "none",
            "image_size": SIDE,
            "out": self.run("base"),
            "epochs": self.effort.base,
            "batch_size": 64,
            "optimizer": {"lr": 2e-3},
            "augment": {"flip": False, "crop": (0.4, 1.0), "ratio": (0.6, 1.67)},
            **self._common(),
        }

    def source(self, name: str) -> dict[str, Any]:
        """Fine-tuning of the base on one source."""
        return {
            "data": self.domain(name),
            "model": self.bundle("base"),
            "out": self.run(f"source-{name}"),
            "epochs": self.effort.source,
            "batch_size": 64,
            "optimizer": {"lr": 1e-3},
            "augment": {"flip": False, "crop": (0.4, 1.0)},
            **self._common(),
        }

    def fusion(self, draw: int) -> dict[str, Any]:
        """The average of the source models; BatchNorm statistics from target images, without their labels."""
        return {
            "method": "average",
            "data": self.target(draw),
            "out": self.run(f"draw-{draw}/fused"),
            "workers": 0,
        }

    def alignment(self, draw: int) -> dict[str, Any]:
        """CORAL from the printed digits to the handwritten ones, whose labels it does not read."""
        return {
            "source": {"path": self.domain("pool"), "limit": 1500},
            "target": self.target(draw),
            "method": "coral",
            "out": self.run(f"draw-{draw}/aligned"),
            "workers": 0,
        }

    def trainings(self, draw: int) -> dict[str, dict[str, Any]]:
        """By method: the fine-tuning on the labelled target images of one draw."""
        one = self.sources[draw % len(self.sources)]  # in turn, so that no source is chosen by its result
        return {
            SCRATCH: self._scratch(draw),
            PROBE: self._probe(draw),
            ONE_SOURCE: self._full(draw, "one-source", self.bundle(f"source-{one}")),
            FUSED: self._full(draw, "fused-tuned", self.bundle(f"draw-{draw}/fused")),
        }

    def _scratch(self, draw: int) -> dict[str, Any]:
        start = {"model": MODEL, "weights": "none", "image_size": SIDE, "optimizer": {"lr": 1e-3}}
        return {**self._on_target(draw, "scratch"), **start}

    def _full(self, draw: int, name: str, bundle: Path) -> dict[str, Any]:
        start = {"model": bundle, "optimizer": {"lr": 3e-4}}
        return {**self._on_target(draw, name), **start}

    def _probe(self, draw: int) -> dict[str, Any]:
        """A linear probe: the frozen part of fixed images is computed once and kept in the demo's folder."""
        start = {"model": self.bundle("base"), "train": "head", "optimizer": {"lr": 3e-3}}
        fixed = {"augment": {"flip": False, "crop": None}, "cache": {"folder": self.run("cache")}}
        return {**self._on_target(draw, "probe"), **start, **fixed}

    def _on_target(self, draw: int, name: str) -> dict[str, Any]:
        """What all trainings on the labelled images share; they are too few to hold any out."""
        return {
            "data": self.target(draw),
            "out": self.run(f"draw-{draw}/{name}"),
            "validation": 0,
            "epochs": self.effort.target,
            "batch_size": 10,
            "augment": {"flip": False, "crop": (0.6, 1.0)},
            **self._common(),
        }

    def _common(self) -> dict[str, Any]:
        """Small images: no decoding processes, and no trial of other precisions than fp32."""
        return {
            "precision": "fp32",
            "label_smoothing": 0.1,
            "workers": 0,
            "seed": self.recipe.seed,
            "checkpoint": {"keep": 1},
        }
