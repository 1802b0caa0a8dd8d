"""The package behind the server: loaded in the background, then asked for answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from tldist.process import core_count
from tldist.runtime.decode import BadImage
from tldist.runtime.package import Package, PackageConfig
from tldist.serve.answers import Wanted, describe_answer
from tldist.serve.batching import Batcher, Places
from tldist.serve.metrics import Metrics
from tldist.serve.recipe import ServeRecipe
from tldist.serve.uploads import Upload, decode


class Service:
    """One package that answers; everything but decoding and the model happens on the event loop.

    Attributes:
        recipe: the settings.
        config: of the package.
        metrics: what has been counted.
        ready: whether it answers: loaded, checked and warm.
        failure: why it could not be loaded.
    """

    def __init__(self, recipe: ServeRecipe, config: PackageConfig) -> None:
        self.recipe, self.config, self.metrics = recipe, config, Metrics()
        self.ready = False
        self.failure: Exception | None = None
        self._package: Package | None = None
        self._model = ThreadPoolExecutor(1, "model")
        self._decoders = ThreadPoolExecutor(recipe.decoders or core_count(), "decode")
        self.batcher = Batcher(
            self._run,
            self._model,
            max_batch=recipe.max_batch,
            max_delay=recipe.max_delay_ms / 1000,
            capacity=recipe.queue,
        )
        self.metrics.watch("tldist_ready", "Whether predictions are answered.", lambda: float(self.ready))
        self.metrics.watch("tldist_queue_length", "Images that wait.", lambda: float(self.batcher.length))
        self.metrics.watch(
            "tldist_images_in_flight",
            "Images received, decoded, waiting or computed.",
            lambda: float(self.batcher.admitted),
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load in the background and answer, until the server has drained."""
        tasks = [asyncio.create_task(self._start()), asyncio.create_task(self._work())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._model.shutdown(cancel_futures=True)
            self._decoders.shutdown(cancel_futures=True)

    async def _start(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            self._package = await loop.run_in_executor(self._model, load, self.recipe)
            self.ready = True
        except Exception as error:  # told by `failure`: the server stops, and the command says why
            self.failure = error

    async def _work(self) -> None:
        await self.batcher.work(self.metrics.observe_batch)

    def _run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        assert self._package is not None, "nothing is admitted before the package is loaded"
        return self._package.run(images)

    async def answer(self, places: Places, uploads: list[Upload], wanted: Wanted) -> list[dict[str, Any]]:
        """What the model says about each image, or why one could not be decoded (``error``)."""
        return await asyncio.gather(*(self._answer_one(places, upload, wanted) for upload in uploads))

    async def _answer_one(self, places: Places, upload: Upload, wanted: Wanted) -> dict[str, Any]:
        named = {"name": upload.name} if upload.name is not None else {}
        await self.batcher.room()
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(
                self._decoders, decode, upload.data, self.config, self.recipe.max_pixels
            )
        except BadImage as error:
            places.drop()
            self.metrics.images.labels("bad").inc()
            return {**named, "error": str(error)}
        row = await places.submit(image)
        self.metrics.images.labels("ok").inc()
        return {**named, **describe_answer(row, self.config, wanted)}


def load(recipe: ServeRecipe) -> Package:
    """Open a package: its hashes checked, its self-test passed, warm at the smallest and the largest batch.

    Raises:
        TldistError: damaged, it does not run here, or it computes something else here.
    """
    return Package.open(
        recipe.package,
        threads=recipe.threads,
        spinning=False,  # decoding needs the cores too
        provider=recipe.provider,
        warm_up=sorted({1, recipe.max_batch}),
    )
