"""Pensieve's rules of how turns come back, run together and give way, one by one, on a core with the fake
model and tiny tiers.  Section numbers are the paper's.  What is kept is in test_pensieve.py; that a layer
waits for its part of a load, in test_loading_by_layer.py.
"""

import pytest

from engine.cache.costs import CostTable
from engine.conversation import Turn, TurnState
from engine.types import FinishReason, RunState
from tests.engine.two_tiers import SIZE, TwoTiers
from tests.fakes import stateless_reply

# -- coming back (4.3.3)


def test_loads_begin_when_a_turn_is_accepted_in_order_of_the_queue_and_few_per_step() -> None:
    tiers = TwoTiers(num_slots=60, num_host_slots=80, max_concurrent=1)
    one, two = tiers.tell(1, 12), tiers.tell(2, 12)
    tiers.bring_to_host(one)
    tiers.bring_to_host(two)
    runs = tiers.begin(tiers.open(), [3] * 10, num_new=12)
    tiers.step()
    waiting = [tiers.begin(one, [8]), tiers.begin(two, [9])]
    order: list[int] = []
    while "host" in tiers.states(two):
        blocks, step = tiers.manager.blocks, tiers.step()
        assert step is not None and runs.state is TurnState.RUNNING
        assert 0 < len(step.plan.loads) <= tiers.manager.tiers.num_per_step == 8
        slots = blocks.slot.tolist()
        order += [slots.index(move.device_slot) for move in step.plan.loads]
    assert order == [*one.table.blocks[:12].tolist(), *two.table.blocks[:12].tolist()]
    computed = tiers.runner.num_computed
    left = runs.max_new - runs.num_generated
    tiers.settle(runs, *waiting)
    assert tiers.runner.num_computed - computed == left + 2 * 2, "the prompt, and the reply before it"
    for turn in waiting:
        assert turn.usage is not None and turn.usage.cached_host_tokens == 12 * SIZE


def test_a_turn_attends_in_the_step_that_brings_its_blocks() -> None:
    tiers = TwoTiers(num_slots=16, num_host_slots=40)
    first = tiers.tell(1, 10)
    tiers.bring_to_host(first)
    turn = tiers.begin(first, [9])
    step = tiers.step()
    assert step is not None and len(step.plan.loads) == 10
    assert turn.state is TurnState.FINISHED
    assert turn.reply_ids == stateless_reply([*[1] * 40, *first.tokens[40:41], 9], 1, frozenset())


def test_a_turn_is_as_short_as_what_it_computes_whatever_comes_from_the_host() -> None:
    tiers = TwoTiers(num_slots=60, num_host_slots=80, max_step_tokens=8)
    long_ago = tiers.tell(1, 12)
    tiers.bring_to_host(long_ago)
    others = [tiers.begin(tiers.open(), [2] * 60), tiers.begin(tiers.open(), [3] * 20)]
    turn = tiers.begin(long_ago, [4] * 4)
    step = tiers.step()
    assert step is not None and len(step.plan.loads) == 12
    assert turn.state is TurnState.FINISHED and not any(other.reply_ids for other in others)
    tiers.settle(*others)


@pytest.mark.parametrize(
    ("num_idle", "stores"), [(22, False), (28, True)], ids=["below a quarter", "below a tenth"]
)
def test_nothing_is_copied_off_the_device_while_something_is_copied_to_it_unless_a_tenth_is_left(
    num_idle: int, stores: bool
) -> None:
    tiers = TwoTiers(num_slots=40, num_host_slots=80)
    first = tiers.tell(1, 10)
    tiers.bring_to_host(first)
    tiers.tell(2, num_idle)
    assert tiers.manager.statistics().num_stored == 10, "that was all"
    turn = tiers.begin(first, [9], num_new=3)
    step = tiers.step()
    assert step is not None and len(step.plan.loads) == 10
    assert bool(step.plan.stores) == stores
    step = tiers.step()
    assert step is not None and not step.plan.loads and step.plan.stores, "no load is under way any more"
    tiers.settle(turn)


# -- memory pressure (4.3.5)


@pytest.mark.parametrize(("num_blocks", "is_admitted"), [(3, True), (4, False)])
def test_nothing_is_admitted_into_the_last_tenth_while_others_run(num_blocks: int, is_admitted: bool) -> None:
    tiers = TwoTiers(num_slots=20, num_host_slots=40)
    runs = tiers.begin(tiers.open(), [1] * (15 * SIZE - 3), num_new=3)
    tiers.step()
    assert tiers.manager.num_available == 5
    prompt = [2] * (num_blocks * SIZE - 1)  # and a slot for the first token of the reply
    other = tiers.begin(tiers.open(), prompt)
    tiers.step()
    assert (other.state is not TurnState.WAITING) == is_admitted
    tiers.settle(runs, other)


def test_a_lone_conversation_may_take_the_last_tenth() -> None:
    tiers = TwoTiers(num_slots=20, num_host_slots=40)
    turn = tiers.begin(tiers.open(), [1] * (20 * SIZE - 3), num_new=3)
    tiers.settle(turn)
    assert turn.usage is not None and tiers.manager.pool.num_free == 0


def test_the_newest_arrival_is_suspended_first_and_resumes_first_with_nothing_computed_again() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=60)
    told: list[tuple[int, RunState]] = []
    where: list[str] = []
    turns: list[Turn] = []

    def note(turn: Turn, state: RunState, _: object) -> None:
        told.append((turns.index(turn), state))
        if state is RunState.SUSPENDED:
            kept = tiers.states(turn.conversation)[: len(turn.conversation.tokens) // SIZE]
            where.extend(kept)

    tiers.core.scheduler.on_state = note
    turns += [tiers.begin(tiers.open(), [n] * 9, num_new=20) for n in (1, 2, 3)]
    for _ in range(2):
        tiers.step()
    turns.append(tiers.begin(tiers.open(), [4] * 16, num_new=2))
    tiers.settle(*turns)
    suspended = [n for n, state in told if state is RunState.SUSPENDED]
    assert suspended[0] == 2 and 0 not in suspended, "the newest first, and the oldest never"
    assert where and "dropped" not in where
    runs = [n for n, state in told if state is RunState.RUNNING]
    assert runs.index(3) > max(at for at, n in enumerate(runs) if n == 2), "it stood at the head of the queue"
    for n, turn in enumerate(turns[:3], 1):
        assert turn.reply_ids == stateless_reply([n] * 9, 20, frozenset())
    assert tiers.runner.num_computed == 3 * (9 + 19) + 16 + 1, "each position once"
    assert tiers.manager.statistics().num_loaded > 0


# -- batches without phases (4.2), dropped tokens (4.3.4)


def test_prompts_and_decoding_turns_share_a_step_first_come_first_served() -> None:
    tiers = TwoTiers(num_slots=40, num_host_slots=40, max_step_tokens=12)
    decodes = tiers.begin(tiers.open(), [1] * 6, num_new=9)
    tiers.step()
    others = [tiers.begin(tiers.open(), [n] * 8) for n in (2, 3)]
    step = tiers.step()
    assert step is not None
    assert [(s.row, s.length) for s in step.plan.segments] == [
        (decodes.row, 1),
        (others[0].row, 8),
        (others[1].row, 3),
    ]
    tiers.settle(decodes, *others)


def test_dropped_blocks_are_computed_at_their_own_positions_before_the_prompt_in_one_step() -> None:
    tiers = TwoTiers(num_slots=16, num_host_slots=40)
    first = tiers.tell(1, 10)
    tiers.bring_to_host(first, range(2, 5))
    tiers.drop(first, [0, 1, 6, 8])
    assert tiers.states(first)[:10] == [*["dropped"] * 2, *["host"] * 3, *["device", "dropped"] * 2, "device"]
    turn = tiers.begin(first, [9])
    step = tiers.step()
    assert step is not None and len(step.plan.loads) == 3
    segments = [(s.first // SIZE, s.length) for s in step.plan.segments]
    assert segments == [(0, 2 * SIZE), (6, SIZE), (8, SIZE), (10, 2)]
    assert turn.reply_ids == stateless_reply([*[1] * 40, first.tokens[40], 9], 1, frozenset())


def test_each_block_is_loaded_or_computed_as_costs_less() -> None:
    costs = CostTable({SIZE: 1.0, 64: 9.0}, load_s=4.0)
    tiers = TwoTiers(num_slots=20, num_host_slots=40, costs=costs)
    first = tiers.tell(1, 10)
    tiers.bring_to_host(first, range(10))
    turn = tiers.begin(first, [9])
    step = tiers.step()
    assert step is not None
    is_loaded = [costs.compute_s((i + 1) * SIZE) >= 4.0 for i in range(10)]
    assert len(step.plan.loads) == sum(is_loaded) == 4
    assert step.plan.segments[0].length == is_loaded.index(True) * SIZE
    tiers.settle(turn)


@pytest.mark.parametrize("place", ["computed", "loaded"])
def test_another_conversation_brings_a_block_back_for_all_wherever_the_holes_are(place: str) -> None:
    tiers = TwoTiers(num_slots=32, num_host_slots=40)
    history = [(n * 7) % 90 + 1 for n in range(8 * SIZE)]
    one, two = tiers.open(), tiers.open()
    tiers.say(one, [*history, 1])
    tiers.say(two, [*history, 2])
    assert one.table.blocks[:8].tolist() == two.table.blocks[:8].tolist()
    holes = [0, 3, 4, 7]
    if place == "loaded":
        tiers.bring_to_host(one, holes)
    else:
        tiers.drop(one, holes)
    usage = tiers.say(two, [3])
    found = usage.cached_host_tokens if place == "loaded" else usage.recomputed_tokens
    assert found == len(holes) * SIZE
    computed = tiers.runner.num_computed
    usage = tiers.say(one, [4])
    assert usage.cached_device_tokens == 8 * SIZE + 1 and tiers.runner.num_computed - computed == 2


def test_what_was_loaded_for_a_turn_that_was_cancelled_is_on_the_device_for_the_next() -> None:
    tiers = TwoTiers(num_slots=40, num_host_slots=40, max_concurrent=1)
    first = tiers.tell(1, 6)
    tiers.bring_to_host(first)
    runs = tiers.begin(tiers.open(), [3] * 10, num_new=12)
    tiers.step()
    waits = tiers.begin(first, [8])
    while "host" in tiers.states(first):
        tiers.step()
    assert waits.state is TurnState.WAITING
    tiers.core.finish(waits, FinishReason.CANCELLED, None)
    tiers.settle(runs)
    usage = tiers.say(first, [9])
    assert (usage.cached_device_tokens, usage.cached_host_tokens) == (6 * SIZE, 0)
