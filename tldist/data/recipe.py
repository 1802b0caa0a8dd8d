"""The settings of augmentation, for every stage that learns from images."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tldist.recipe import Recipe


class ViewRecipe(Recipe):
    """What changes an image from epoch to epoch; derived from (seed, epoch, sample), never saved."""

    crop: tuple[float, float] | None = (0.35, 1.0)
    """Train on a random part of this share of the area (least, most), resized; none: the centre, as in
    evaluation."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Least and greatest width-to-height ratio of that part."""
    flip: bool = True
    """Mirror half of the images left to right (not for digits and text)."""
    brightness: float = Field(default=0.0, ge=0, lt=1)
    """Scale the grey values by a random factor of up to 1 plus or minus this."""
    policy: Literal["none", "randaugment", "trivialaugment"] = "none"
    """Random operations on each image: two of magnitude 9 (RandAugment, arXiv:1909.13719), or one of any
    (TrivialAugment, arXiv:2103.10158)."""
    views: int | None = Field(default=None, ge=1)
    """Take this many fixed augmented views of each image in turn, epoch by epoch, instead of a new one each
    time: the frozen part is then computed once a view."""

    @property
    def is_deterministic(self) -> bool:
        """Whether an image always looks the same."""
        return self.crop is None and not self.flip and not self.brightness and self.policy == "none"
