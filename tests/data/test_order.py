"""The order of data: every sample once an epoch, whatever the processes and the interruptions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tldist.data.order import (
    StepPlan,
    blocks_of,
    epoch_order,
    plan_beside,
    plan_steps,
    share,
    steps_per_epoch,
)

sizes = st.integers(1, 60)


def whole_steps(size: int, batch: int, seed: int, epochs: int, first: int, ranks: int) -> list[list[int]]:
    """The samples of each step, put together from all ranks."""
    plans = [
        list(
            plan_steps(
                size=size,
                batch_size=batch,
                seed=seed,
                epochs=epochs,
                first_step=first,
                rank=rank,
                ranks=ranks,
            )
        )
        for rank in range(ranks)
    ]
    steps = []
    for parts in zip(*plans, strict=True):
        assert len({part.step for part in parts}) == 1
        together = [int(i) for part in parts for i in part.indices]
        assert len(together) == parts[0].total
        steps.append(together)
    return steps


@settings(max_examples=60, deadline=None)
@given(sizes, st.integers(1, 20), st.integers(0, 3), st.integers(1, 3), st.integers(1, 5))
def test_plan_steps__the_same_samples_for_any_number_of_processes(
    size: int, batch: int, seed: int, epochs: int, ranks: int
) -> None:
    alone = whole_steps(size, batch, seed, epochs, 0, 1)
    assert whole_steps(size, batch, seed, epochs, 0, ranks) == alone
    per_epoch = steps_per_epoch(size, batch)
    assert len(alone) == per_epoch * epochs
    for epoch in range(epochs):
        seen = [i for step in alone[epoch * per_epoch : (epoch + 1) * per_epoch] for i in step]
        assert sorted(seen) == list(range(size))


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 20), st.integers(1, 4), st.data())
def test_plan_steps__going_on_at_any_step_gives_the_rest(
    size: int, batch: int, ranks: int, data: st.DataObject
) -> None:
    alone = whole_steps(size, batch, 0, 3, 0, 1)
    first = data.draw(st.integers(0, len(alone)))
    assert whole_steps(size, batch, 0, 3, first, ranks) == alone[first:]


@given(st.integers(0, 40), st.integers(1, 7))
def test_share__parts_differ_by_one_at_most(size: int, ranks: int) -> None:
    parts = [share(np.arange(size), rank, ranks) for rank in range(ranks)]
    assert np.concatenate(parts).tolist() == list(range(size))
    lengths = [len(part) for part in parts]
    assert max(lengths) - min(lengths) <= 1


def test_epoch_order__epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


@given(sizes, st.integers(1, 9), st.integers(1, 4))
def test_blocks_of__batches_are_those_of_one_process(size: int, batch: int, ranks: int) -> None:
    alone = [block.tolist() for block in blocks_of(size, batch, 0, 1)]
    parts = [blocks_of(size, batch, rank, ranks) for rank in range(ranks)]
    dealt = [parts[k % ranks][k // ranks].tolist() for k in range(len(alone))]
    assert dealt == alone


# -- a second domain beside the first ----------------------------------------------------------------------


def besides(size: int, batch_size: int, first_step: int = 0, rank: int = 0, ranks: int = 1) -> list[StepPlan]:
    plans = plan_steps(
        size=20, batch_size=batch_size, seed=1, epochs=4, first_step=first_step, rank=rank, ranks=ranks
    )
    return list(plan_beside(plans, size=size, batch_size=batch_size, seed=1, rank=rank, ranks=ranks))


@pytest.mark.parametrize("size", [2, 7, 8, 9, 30])
def test_beside__whole_batches_without_a_repeat_in_an_epoch_of_its_own(size: int) -> None:
    plans = besides(size, 8)
    taken = min(8, size)
    assert [plan.step for plan in plans] == list(range(12))
    assert all(len(set(plan.indices.tolist())) == taken == plan.total for plan in plans)
    for epoch in {plan.epoch for plan in plans}:
        seen = [i for plan in plans if plan.epoch == epoch for i in plan.indices.tolist()]
        assert len(set(seen)) == len(seen)
    assert plans[0].indices.tolist() != besides(size, 8, first_step=6)[0].indices.tolist() or size == 2


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("first_step", [0, 5])
def test_beside__depends_on_seed_and_step_alone(ranks: int, first_step: int) -> None:
    whole = {plan.step: plan.indices.tolist() for plan in besides(13, 8)}
    shares = [besides(13, 8, first_step, rank, ranks) for rank in range(ranks)]
    for plans in zip(*shares):
        assert [i for plan in plans for i in plan.indices.tolist()] == whole[plans[0].step]
