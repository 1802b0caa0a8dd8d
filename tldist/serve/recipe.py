"""The settings of ``tldist serve``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from tldist.recipe import Free, Recipe
from tldist.runtime.decode import MAX_PIXELS


class ServeRecipe(Recipe):
    """Answer HTTP requests with a package, until SIGTERM or Ctrl-C."""

    inputs: ClassVar[tuple[str, ...]] = ("package",)

    package: Free[Path]
    """The exported package: its folder."""
    host: Free[str] = "127.0.0.1"
    """The address to listen on. The default is reached from this machine alone; 0.0.0.0: from any other."""
    port: Free[int] = Field(default=8000, ge=0, le=65535)
    """The TCP port; 0: a free one, which is printed."""
    max_batch: Free[int] = Field(default=32, ge=1)
    """Images that run at once, at most."""
    max_delay_ms: Free[float] = Field(default=5, ge=0, le=1000)
    """Milliseconds that an image waits for others to share its batch. It waits only while others are being
    received or decoded; a client that is alone never waits."""
    queue: Free[int] = Field(default=256, ge=1)
    """Images that may be received, decoded, waiting and computed at the same time; requests for more are
    answered with 503 at once."""
    timeout_s: Free[float] = Field(default=30, gt=0)
    """Seconds that a request may take: 408 where its body did not come, 504 where the answer did not."""
    max_body_mb: Free[float] = Field(default=32, gt=0)
    """Largest body of a request, in millions of bytes; larger ones are answered with 413."""
    max_images: Free[int] = Field(default=32, ge=1)
    """Images in one request, at most."""
    max_pixels: Free[int] = Field(default=50_000_000, ge=1, le=MAX_PIXELS)
    """Largest picture, in pixels; larger ones are refused by their header, before they are decoded."""
    top: Free[int] = Field(default=5, ge=1)
    """How many classes an answer names, where the request does not say."""
    provider: Free[str | None] = None
    """ONNX Runtime's name of an execution provider; none: the one of the package's profile."""
    threads: Free[int | None] = Field(default=None, ge=1)
    """Threads of the model; none: ONNX Runtime's choice, all cores."""
    decoders: Free[int | None] = Field(default=None, ge=1)
    """Threads that decode images; none: the number of cores."""
    access_log: Free[bool] = False
    """Print a line a request."""

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        if self.queue < self.max_images:
            raise ValueError(
                f"queue={self.queue} cannot hold one request of max_images={self.max_images}; raise queue, "
                f"or lower max_images"
            )
        return self

    @property
    def max_body_bytes(self) -> int:
        """``max_body_mb`` in bytes."""
        return int(self.max_body_mb * 1_000_000)
