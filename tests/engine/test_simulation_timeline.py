"""When steps end on simulated devices, and in which order things happen there."""

import numpy as np
import pytest

from engine.batch import RowParams, Segment, StepPlan
from engine.cache.block import BlockMove
from engine.simulation.profiles import COPIES_SLOW_EACH_OTHER
from engine.simulation.step_costs import StepCosts
from engine.simulation.timeline import CopiesBeside, CopiesFirst
from engine.simulation.virtual_time import Agenda
from engine.types import SamplingParams

COSTS = StepCosts(
    fixed_s=1.0,
    weights_s=2.0,
    token_s=0.5,
    row_s=0.0,
    kv_token_s=0.0,
    pair_s=0.0,
    load_s=3.0,
    store_s=4.0,
    copy_latency_s=0.5,
    num_layers=10,
    overlaps=True,
)
STEP_S = 3.0  # of few tokens


def plan(
    slot: int = 0, stores: tuple[int, ...] = (), loads: tuple[int, ...] = (), tokens: int = 1
) -> StepPlan:
    """Writes to block `slot`; copies these blocks."""
    draw = RowParams(SamplingParams(), 0, tokens, 0)
    segment = Segment(0, 0, (1,) * tokens, np.array([slot], np.int32), draw)
    return StepPlan(0, (segment,), moves(stores), moves(loads))


def moves(slots: tuple[int, ...]) -> tuple[BlockMove, ...]:
    return tuple(BlockMove(slot, slot) for slot in slots)


def beside() -> CopiesBeside:
    return CopiesBeside(COSTS, block_size=16)


def test_steps_follow_one_another_and_wait_for_nothing_else() -> None:
    timeline = beside()
    assert timeline.launch(plan(), 10.0) == 13.0
    assert timeline.launch(plan(), 10.0) == 16.0
    assert timeline.launch(plan(tokens=8), 20.0) == 25.0


def test_copies_without_streams_come_first() -> None:
    timeline = CopiesFirst(COSTS)
    assert timeline.launch(plan(stores=(1,), loads=(2, 3)), 0.0) == (0.5 + 4.0) + (0.5 + 6.0) + STEP_S
    assert timeline.launch(plan(), 0.0) == 14.0 + STEP_S


def test_a_short_load_is_hidden_but_for_its_first_layer() -> None:
    loads_s = 0.5 + 3.0
    assert beside().launch(plan(tokens=16, loads=(5,)), 0.0) == pytest.approx(9.0 + loads_s / 10)


def test_a_long_load_hides_the_computation_but_for_its_last_layer() -> None:
    loads_s = 0.5 + 30.0
    ended = beside().launch(plan(loads=tuple(range(1, 11))), 0.0)
    assert ended == pytest.approx(loads_s + STEP_S / 10)


def test_a_load_begins_when_its_step_is_launched_and_not_when_the_one_before_has_ended() -> None:
    timeline = beside()
    timeline.launch(plan(), 0.0)
    assert timeline.launch(plan(loads=(5,)), 0.0) == pytest.approx(2 * STEP_S)


def test_nothing_waits_for_stores_but_who_writes_where_they_read() -> None:
    timeline = beside()
    assert timeline.launch(plan(stores=(7, 8)), 0.0) == STEP_S
    assert timeline.launch(plan(slot=1), 3.0) == 2 * STEP_S
    assert timeline.launch(plan(slot=8), 6.0) == pytest.approx(0.5 + 8.0 + STEP_S)
    assert timeline.launch(plan(slot=8), 20.0) == 20.0 + STEP_S


def test_a_load_waits_for_the_slot_that_is_being_stored() -> None:
    ended = beside().launch(plan(stores=(7,), loads=(7,)), 0.0)
    assert ended == pytest.approx(0.5 + 4.0 + 0.5 + 3.0 + STEP_S / 10)


def test_copies_both_ways_slow_each_other() -> None:
    alone, both = beside(), beside()
    both.launch(plan(stores=(1, 2, 3, 4, 5, 6)), 0.0)
    alone.launch(plan(), 0.0)
    loads = (10, 11, 12, 13)
    slower = both.launch(plan(loads=loads), 3.0) - alone.launch(plan(loads=loads), 3.0)
    assert slower == pytest.approx((COPIES_SLOW_EACH_OTHER - 1) * (0.5 + 12.0))


def test_what_is_put_down_for_the_same_time_happens_in_order_and_the_clock_stands_there() -> None:
    agenda, happened = Agenda(), []
    for name in "ab":
        agenda.at(2.0, lambda name=name: happened.append((name, agenda.now)))
    agenda.at(1.0, lambda: agenda.after(0.5, lambda: happened.append(("first", agenda.now))))
    agenda.run_until(1.9)
    assert happened == [("first", 1.5)] and agenda.monotonic() == 1.9
    agenda.run_until(3.0)
    assert happened == [("first", 1.5), ("a", 2.0), ("b", 2.0)]
    assert not agenda.happen()
