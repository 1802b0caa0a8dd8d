"""The settings of ``tldist models`` and ``tldist layers``."""

from __future__ import annotations

from typing import ClassVar

from tldist.recipe import Free, Recipe


class ModelsRecipe(Recipe):
    """List the architectures."""

    inputs: ClassVar[tuple[str, ...]] = ("pattern",)

    pattern: str = "*"
    """A part of the name (resnet), or a pattern (resnet*, vit_?_16)."""


class LayersRecipe(Recipe):
    """List a model's blocks and layers."""

    inputs: ClassVar[tuple[str, ...]] = ("model",)

    model: str
    """A torchvision name (`tldist models`), timm/NAME, a bundle or run, or package.module:function."""
    trust_code: Free[bool] = False
    """Run code that a bundle names (package.module:function)."""
