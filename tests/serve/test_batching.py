"""The queue by itself: what shares a batch, who waits for whom, and what is given up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tldist.serve import batching
from tldist.serve.batching import Batcher, QueueFull


class Model:
    """Sums each image, and remembers the shapes of its batches."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.seconds = seconds

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.shapes.append(images.shape)
        time.sleep(self.seconds)
        if images.max() == 255:
            raise MemoryError("too much")
        return {"sum": images.sum((1, 2, 3), dtype=np.float32)[:, None]}


def with_batcher(
    work: Callable[[Batcher], Awaitable[Any]], model: Model, *, max_delay: float = 0.0, capacity: int = 100
) -> Any:
    async def main() -> Any:
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(model, pool, max_batch=4, max_delay=max_delay, capacity=capacity)
            task = asyncio.create_task(batcher.work(lambda size, seconds: None))
            try:
                return await asyncio.wait_for(work(batcher), 20)
            finally:
                task.cancel()
                assert (batcher.admitted, batcher.coming) == (0, 0)

    return asyncio.run(main())


def image(value: int, height: int = 2) -> np.ndarray:
    return np.full((height, 2, 3), value, np.uint8)


def test_batches__hold_at_most_max_batch_of_one_shape() -> None:
    model = Model()
    values = [(number, 2 + number % 2) for number in range(11)]

    async def work(batcher: Batcher) -> list[float]:
        with batcher.places() as places:
            places.take(len(values))
            answers = [places.submit(image(value, height)) for value, height in values]
            return [float((await answer)["sum"][0]) for answer in answers]

    assert with_batcher(work, model) == [value * height * 6 for value, height in values]
    assert sorted(model.shapes) == [(1, 3, 2, 3), (2, 2, 2, 3), (4, 2, 2, 3), (4, 3, 2, 3)]
    assert model.shapes[0][1] == 2, "the oldest image goes first"


def test_delay__nobody_waits_alone() -> None:
    async def work(batcher: Batcher) -> float:
        start = time.monotonic()
        with batcher.places() as places:
            places.take(1)
            await places.submit(image(1))
        return time.monotonic() - start

    assert with_batcher(work, Model(), max_delay=5.0) < 2.5


@pytest.mark.parametrize("arrives", [True, False])
def test_delay__for_those_on_their_way(arrives: bool) -> None:
    model = Model()

    async def work(batcher: Batcher) -> float:
        start = time.monotonic()
        with batcher.places() as first, batcher.places() as second:
            first.take(1)
            second.take(1)
            mine = first.submit(image(1))
            await asyncio.sleep(0.05)
            assert not model.shapes
            theirs = second.submit(image(2)) if arrives else second.drop()
            await mine
            if theirs:
                await theirs
        return time.monotonic() - start

    assert with_batcher(work, model, max_delay=5.0) < 2.5
    assert model.shapes == [(2 if arrives else 1, 2, 2, 3)]


def test_delay__ends() -> None:
    model = Model()

    async def work(batcher: Batcher) -> None:
        with batcher.places() as slow, batcher.places() as places:
            slow.take(1)
            places.take(1)
            await places.submit(image(1))
            assert batcher.admitted == 2

    with_batcher(work, model, max_delay=0.05)
    assert model.shapes == [(1, 2, 2, 3)]


def test_places__are_bounded_and_given_back() -> None:
    async def work(batcher: Batcher) -> None:
        for _ in range(3):
            with batcher.places() as places:
                places.take(3)
                with pytest.raises(QueueFull):
                    places.take(1)
                with batcher.places() as others, pytest.raises(QueueFull):
                    others.take(1)
                await places.submit(image(1))
                places.drop()

    with_batcher(work, Model(), capacity=3)


def test_answers__who_gives_up_is_not_computed() -> None:
    model = Model(seconds=0.2)

    async def work(batcher: Batcher) -> None:
        with batcher.places() as places:
            places.take(4)
            first = places.submit(image(1))
            await asyncio.sleep(0.05)
            waiting = [places.submit(image(value)) for value in (2, 3, 4)]
            waiting[1].cancel()
            answers = await asyncio.gather(first, waiting[0], waiting[2])
            assert [float(answer["sum"][0]) for answer in answers] == [12, 24, 48]

    with_batcher(work, model)
    assert model.shapes == [(1, 2, 2, 3), (2, 2, 2, 3)]


def test_answers__a_batch_that_fails_fails_alone() -> None:
    async def work(batcher: Batcher) -> None:
        with batcher.places() as places:
            places.take(2)
            with pytest.raises(MemoryError):
                await places.submit(image(255))
            assert float((await places.submit(image(2)))["sum"][0]) == 24

    with_batcher(work, Model())


def test_memory__of_large_pictures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "MOST_BYTES", 30)  # two images of 12 bytes
    model = Model(seconds=0.1)

    async def work(batcher: Batcher) -> None:
        with batcher.places() as places:
            places.take(5)
            answers = [places.submit(image(1)) for _ in range(5)]
            room = asyncio.ensure_future(batcher.room())
            await asyncio.sleep(0)
            assert not room.done()
            await asyncio.gather(*answers)
            await room

    with_batcher(work, model)
    assert [shape[0] for shape in model.shapes] == [2, 2, 1]
