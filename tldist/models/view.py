"""What a member of a composite sees: the composite's input, resized and re-normalised inside of the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tldist.models.composite_layout import Input


class View(nn.Module):
    """Normalised images of a composite to those of one member: resized and re-normalised where they differ.

    The resize is bilinear with antialiasing, ``rows @ images @ columns.T`` with the weights of
    `torch.nn.functional.interpolate`: matrix products run and are exact on every execution provider
    (TensorRT has no antialiased Resize) and their gradients are deterministic.

    Args:
        outer: what the composite takes.
        inner: what the member takes.
    """

    scale: Tensor | None
    shift: Tensor | None
    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, outer: Input, inner: Input) -> None:
        super().__init__()
        scale, shift = None, None
        if (outer.mean, outer.std) != (inner.mean, inner.std):
            # (x std_o + mean_o - mean_i) / std_i, of x = (pixel - mean_o) / std_o
            before, after = (torch.tensor([part.mean, part.std]).double() for part in (outer, inner))
            scale = (before[1] / after[1]).float().view(1, 3, 1, 1)
            shift = ((before[0] - after[0]) / after[1]).float().view(1, 3, 1, 1)
        rows = resize_weights(outer.height, inner.height) if outer.height != inner.height else None
        columns = resize_weights(outer.width, inner.width).T if outer.width != inner.width else None
        for name, tensor in (("scale", scale), ("shift", shift), ("rows", rows), ("columns", columns)):
            self.register_buffer(name, tensor, persistent=False)  # the description tells them

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, 3, H', W')."""
        if self.rows is not None:
            images = self.rows @ images
        if self.columns is not None:
            images = images @ self.columns
        if self.scale is not None and self.shift is not None:
            images = images * self.scale + self.shift
        return images


def resize_weights(before: int, after: int) -> Tensor:
    """The weights of an antialiased bilinear resize along one side: float32 (after, before)."""
    each = torch.eye(before, dtype=torch.float64)[None, None]
    resized = nn.functional.interpolate(each, (after, before), mode="bilinear", antialias=True)
    return resized[0, 0].float()
