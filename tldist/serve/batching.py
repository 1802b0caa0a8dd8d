"""The batching queue: images of many requests run together, each answer goes back to its own request.

All state belongs to the event loop, so there are no locks; only the model runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

Answer = dict[str, np.ndarray]
"""The row (D,) of each output, by name."""
Run = Callable[[np.ndarray], dict[str, np.ndarray]]
"""uint8 (N, H, W, 3) to float32 (N, D) of each output, by name."""

MOST_BYTES = 512 << 20
"""Bytes of decoded images in one batch, and in the queue before decoding pauses. Images of the model's own
size never come near; whole pictures of a package with input=picture do."""


class QueueFull(Exception):
    """More images than the queue may hold."""


@dataclass(frozen=True)
class _Waiting:
    image: np.ndarray
    since: float
    answer: asyncio.Future[Answer]


class Batcher:
    """Collects images and runs them, up to ``max_batch`` of one shape at once.

    Args:
        run: the model; called in ``executor``, one batch at a time.
        executor: of one thread.
        max_batch: images that run at once.
        max_delay: seconds that the oldest image waits for others that are on their way.
        capacity: images that may be admitted at the same time.
    """

    def __init__(
        self, run: Run, executor: Executor, *, max_batch: int, max_delay: float, capacity: int
    ) -> None:
        self._run, self._executor = run, executor
        self._max_batch, self._max_delay, self._capacity = max_batch, max_delay, capacity
        self._waiting: deque[_Waiting] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.admitted = 0
        """Images that are received, decoded, waiting or computed now."""
        self.coming = 0
        """Those among them that are still received or decoded."""

    @property
    def length(self) -> int:
        """Images that are decoded and wait for the model."""
        return len(self._waiting)

    def places(self) -> Places:
        """Places in the queue for one request; to be used as a context, which gives them back."""
        return Places(self)

    def take_places(self, images: int) -> None:
        """`QueueFull` where there are not so many left."""
        if self.admitted + images > self._capacity:
            raise QueueFull
        self.admitted += images
        self.coming += images

    def give_back(self, held: int, coming: int) -> None:
        """Of ``held`` places, those of images that never came were counted as coming too."""
        self.admitted -= held
        self._arrive(coming)

    def _arrive(self, images: int) -> None:
        self.coming -= images
        self._changed.set()

    async def room(self) -> None:
        """Wait until decoded images take less than `MOST_BYTES`."""
        await self._room.wait()

    def submit(self, image: np.ndarray) -> asyncio.Future[Answer]:
        """Put an image that has a place, uint8 (H, W, 3), into the queue; its future may be cancelled."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append(_Waiting(image, loop.time(), answer))
        self.coming -= 1
        self._note_change()
        return answer

    async def work(self, observe: Callable[[int, float], None]) -> None:
        """Run batches for ever; ``observe`` is told the size and the seconds of each."""
        loop = asyncio.get_running_loop()
        while True:
            if batch := await self._next():
                start = loop.time()
                await self._answer(batch)
                observe(len(batch), loop.time() - start)

    async def _answer(self, batch: list[_Waiting]) -> None:
        images = [item.image for item in batch]
        loop = asyncio.get_running_loop()
        try:
            outputs = await loop.run_in_executor(self._executor, lambda: self._run(np.stack(images)))
        except Exception as error:  # whatever the provider raises (memory, a lost device) is their answer
            for item in batch:
                if not item.answer.done():
                    item.answer.set_exception(error)
            return
        for row, item in enumerate(batch):
            if not item.answer.done():
                item.answer.set_result({name: values[row] for name, values in outputs.items()})

    async def _next(self) -> list[_Waiting]:
        """The next batch; empty where all who waited have given up."""
        loop = asyncio.get_running_loop()
        while not self._waiting:
            await self._change()
        until = self._waiting[0].since + self._max_delay
        while len(self._waiting) < self._max_batch and self.coming and (left := until - loop.time()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await self._change()
        return self._take()

    def _take(self) -> list[_Waiting]:
        """The oldest image and those of its shape behind it; the others keep their places."""
        batch: list[_Waiting] = []
        rest: deque[_Waiting] = deque()
        size = 0
        for item in self._waiting:
            if item.answer.done():
                continue
            fits = not batch or (
                item.image.shape == batch[0].image.shape
                and len(batch) < self._max_batch
                and size + item.image.nbytes <= MOST_BYTES
            )
            (batch if fits else rest).append(item)
            size += item.image.nbytes if fits else 0
        self._waiting = rest
        self._note_change()
        return batch

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    def _note_change(self) -> None:
        self._changed.set()
        full = sum(item.image.nbytes for item in self._waiting) >= MOST_BYTES
        self._room.clear() if full else self._room.set()


class Places:
    """The places that one request holds, from before its images are received until they are answered."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._held = self._coming = 0

    def __enter__(self) -> Places:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._batcher.give_back(self._held, self._coming)

    def take(self, images: int) -> None:
        """Take places for more images; `QueueFull` where there are not so many left."""
        self._batcher.take_places(images)
        self._held += images
        self._coming += images

    def submit(self, image: np.ndarray) -> asyncio.Future[Answer]:
        """`Batcher.submit` an image that has come to one of the places."""
        self._coming -= 1
        return self._batcher.submit(image)

    def drop(self) -> None:
        """An image will not come: those that wait for it need not."""
        self._coming -= 1
        self._batcher.give_back(0, 1)
