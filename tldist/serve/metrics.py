"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The counters of one server.

    Attributes:
        requests: by path and status code.
        seconds: from the headers of a request for predictions to its answer.
        images: by outcome: ok or bad.
        batches: images of each batch that ran.
        model_seconds: that each batch took in the model.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "tldist_requests", "Requests that were answered.", ["path", "code"], registry=registry
        )
        self.seconds = Histogram(
            "tldist_request_seconds",
            "Seconds from a request for predictions to its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter(
            "tldist_images", "Images received: ok, or bad (not decoded).", ["outcome"], registry=registry
        )
        self.batches = Histogram(
            "tldist_batch_size", "Images that ran at once.", buckets=_SIZES, registry=registry
        )
        self.model_seconds = Histogram(
            "tldist_model_seconds", "Seconds of a batch in the model.", buckets=_SECONDS, registry=registry
        )

    def watch(self, name: str, words: str, value: Callable[[], float]) -> None:
        """Add a gauge that is read when it is asked for."""
        Gauge(name, words, registry=self._registry).set_function(value)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch that ran."""
        self.batches.observe(size)
        self.model_seconds.observe(seconds)

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics as text, and its content type, as the ``Accept`` header asks."""
        encoder, content_type = choose_encoder(accept)
        text: bytes = encoder(self._registry)
        return text, content_type
