"""The settings of ``tldist bench``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from tldist.errors import close_matches
from tldist.recipe import Free, Recipe

WORDS: dict[str, str] = {
    "eager": "PyTorch as it is, in float32",
    "channels_last": "weights and images in the layout N, H, W, C",
    "bf16": "automatic mixed precision with bfloat16",
    "fp16": "automatic mixed precision with float16",
    "bf16_weights": "weights and images in bfloat16",
    "fp16_weights": "weights and images in float16",
    "compile": "torch.compile for the one batch size; on a GPU with CUDA graphs (mode reduce-overhead)",
}
"""What a variant of PyTorch is made of: words joined by +."""
PRECISIONS = ("bf16", "fp16", "bf16_weights", "fp16_weights")
DEFAULTS: dict[str, tuple[str, ...]] = {
    "cpu": (
        "eager",
        "channels_last",
        "bf16",
        "bf16+channels_last",
        "bf16_weights+channels_last",
        "compile",
    ),
    "cuda": (
        "eager",
        "channels_last",
        "bf16+channels_last",
        "fp16+channels_last",
        "fp16_weights+channels_last",
        "compile",
        "compile+fp16_weights+channels_last",
    ),
}
"""The variants that are usual on a device."""


class BenchRecipe(Recipe):
    """Measure a package against PyTorch on this machine."""

    inputs: ClassVar[tuple[str, ...]] = ("package",)

    package: Free[Path]
    """The exported package."""
    bundle: Free[str | None] = None
    """The bundle that it was made from, to run with PyTorch; none: the one that the package's lineage names,
    where it is still there. Without a bundle or PyTorch, ONNX Runtime is measured alone."""
    batches: tuple[int, ...] = (1, 8, 32)
    """Images that run at once."""
    threads: int | None = Field(default=1, ge=1)
    """Of ONNX Runtime and PyTorch alike; none: one a core."""
    seconds: float = Field(default=2.0, gt=0)
    """Measured for each variant at each batch size, after warming up."""
    rounds: int = Field(default=5, ge=1)
    """Parts that these seconds come in: the variants take turns, so that a noisy neighbour hits all alike."""
    variants: tuple[str, ...] = ()
    """Of PyTorch, beside eager: words of eager, channels_last, bf16, fp16, bf16_weights, fp16_weights and
    compile, joined by +; none: the usual ones of the device."""
    provider: Free[str | None] = None
    """ONNX Runtime's name of an execution provider; none: the one of the package's profile."""
    cuda_graphs: bool = False
    """Record ONNX Runtime's launches once for each batch size and replay them (CUDA)."""
    trust_code: Free[bool] = False
    """Run code that the bundle names (package.module:function)."""
    out: Free[Path | None] = None
    """A run folder for the figures (summary.json) and a picture; none: only printed."""

    @model_validator(mode="after")
    def _check_lists(self) -> Self:
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) != len(self.batches):
            raise ValueError(f"batches are different numbers from 1 on, not {list(self.batches)}")
        for variant in self.variants:
            words = variant.split("+")
            for word in words:
                if word not in WORDS:
                    raise ValueError(f"unknown word '{word}' in '{variant}'. {close_matches(word, WORDS)}")
            if sum(word in PRECISIONS for word in words) > 1:
                raise ValueError(f"'{variant}' names more than one precision")
        return self

    def variants_on(self, device: str) -> tuple[str, ...]:
        """The variants to measure on a device (``cpu``, ``cuda``): eager first, the measure of all."""
        return tuple(dict.fromkeys(("eager", *(self.variants or DEFAULTS[device]))))
