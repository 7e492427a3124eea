"""What leaves the device tier when, where it goes, and how it comes back: the rules, one by one, on a core
with the fake model and a host tier.
"""

from dataclasses import replace

import pytest

from engine.batch import StepResult
from engine.cache.block import NO_SLOT, Residency
from engine.cache.costs import CostTable, reload_is_cheaper
from engine.cache.policy import Policy, lru, lru_tail, retention
from engine.conversation import TurnState
from engine.errors import InvariantError
from engine.types import FinishReason, SamplingParams, TurnId
from tests.engine.two_tiers import COSTS, SIZE, TwoTiers
from tests.fakes import GARBAGE, stateless_reply

# -- costs and policies


def test_costs_are_interpolated_between_measurements_and_go_on_beyond_them() -> None:
    costs = CostTable({256: 1.0, 512: 2.0, 1024: 3.0}, load_s=0.5)
    assert [costs.compute_s(end) for end in (32, 256, 384, 512, 768, 1024)] == [1.0, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert costs.compute_s(2048) == pytest.approx(5.0)


def test_a_later_block_never_costs_less_than_an_earlier_one() -> None:
    costs = CostTable({4: 2.0, 8: 1.5, 16: 3.0}, load_s=0.0)
    assert [costs.compute_s(end) for end in (4, 8, 16)] == [2.0, 2.0, 3.0]


@pytest.mark.parametrize(("compute", "load_s"), [({}, 1.0), ({4: 0.0}, 1.0), ({4: 1.0}, -1.0)])
def test_a_table_without_measurements_is_refused(compute: dict[int, float], load_s: float) -> None:
    with pytest.raises(ValueError, match="must be measured"):
        CostTable(compute, load_s)


def test_a_block_is_reloaded_when_that_costs_no_more_than_what_computing_it_would() -> None:
    costs = CostTable({4: 1.0, 64: 4.0}, load_s=2.0)
    assert [reload_is_cheaper(costs, end, 1.0) for end in (4, 16, 32, 64)] == [False, False, True, True]
    assert not reload_is_cheaper(costs, 64, 0.25), "little of it is there, and the copy costs the same"


def test_retention_is_cost_over_idle_time() -> None:
    value = retention(COSTS).value
    assert value(64, 10.0) == pytest.approx(0.5)
    assert value(4, 10.0) < value(32, 10.0) < value(32, 5.0)
    assert value(4, 1.0) > value(64, 10.0), "what was used just now outweighs what costs more"


# -- leaving


@pytest.mark.parametrize(("policy", "first"), [(lru, 0), (retention(COSTS), 0), (lru_tail, 4)])
def test_blocks_of_the_longest_idle_go_first_and_within_it_from_the_policys_end(
    policy: Policy, first: int
) -> None:
    tiers = TwoTiers(num_slots=16, policy=policy)
    oldest = tiers.tell(1, 5)
    tiers.clock.now += 100
    newer = tiers.tell(2, 7)
    tiers.say(tiers.open(), [3] * SIZE)
    gone = [i for i, num_tokens in enumerate(tiers.host_valid(oldest)) if num_tokens]
    assert first in gone and len(gone) < 5
    assert not any(tiers.host_valid(newer))


def test_blocks_are_stored_ahead_of_time_and_stay_valid_on_the_device_until_their_slot_is_needed() -> None:
    tiers = TwoTiers(num_slots=16)
    idle = tiers.tell(1, 13)  # 3 of 16 slots are free: fewer than a quarter
    stored = tiers.manager.statistics().num_stored
    assert stored > 0 and "both" in tiers.states(idle)
    usage = tiers.say(idle, [9])
    assert usage.cached_device_tokens == 13 * SIZE and usage.cached_host_tokens == 0
    assert tiers.manager.statistics().num_loaded == 0


def test_nothing_is_stored_while_a_quarter_is_free() -> None:
    tiers = TwoTiers(num_slots=16)
    tiers.tell(1, 11)
    assert tiers.manager.statistics().num_stored == 0


def test_stores_wait_for_loads_unless_next_to_nothing_is_free() -> None:
    tiers = TwoTiers(num_slots=20, num_host_slots=40)
    first, second = tiers.tell(1, 9), tiers.tell(2, 9)
    tiers.tell(3, 9)
    assert "host" in tiers.states(first)
    tiers.begin(first, [8])
    while not (step := tiers.step()) or not step.plan.loads:
        pass
    free = tiers.manager.pool.num_free + tiers.manager.tiers.idle.num_clean
    ahead = [
        copy for copy in step.copies if not copy.is_load and tiers.manager.blocks.slot[copy.block] != NO_SLOT
    ]
    assert not ahead or free < 0.1 * 20
    assert second.table.num_tokens


def test_what_leaves_the_host_is_dropped_lowest_value_first_and_computed_again() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=6, policy=retention(COSTS))
    conversations = [tiers.tell(n, 5) for n in (1, 2, 3, 4)]
    assert "dropped" in tiers.states(conversations[0]) and tiers.manager.statistics().num_evicted > 0
    usage = tiers.say(conversations[0], [9])
    assert usage.recomputed_tokens > 0
    assert usage.prompt_tokens == 5 * SIZE + 2


def test_a_shared_block_stays_as_long_as_its_latest_user_keeps_it() -> None:
    tiers = TwoTiers(num_slots=16)
    system = [7] * (2 * SIZE)
    early, late = tiers.open(), tiers.open()
    tiers.say(early, [*system, *[1] * (3 * SIZE)])
    tiers.clock.now += 50
    tiers.say(late, [*system, 2])
    tiers.tell(3, 8)
    shared, own = tiers.host_valid(early)[:2], tiers.host_valid(early)[2:5]
    assert any(own)
    assert not any(shared), "they are of one used later"


# -- coming back


def test_a_conversation_comes_back_from_the_host_without_being_computed() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    first = tiers.tell(1, 8)
    tiers.tell(2, 8)
    on_host = tiers.states(first).count("host")
    assert on_host > 0
    computed = tiers.runner.num_computed
    usage = tiers.say(first, [9])
    assert usage.cached_host_tokens >= on_host * SIZE - SIZE and usage.recomputed_tokens == 0
    assert usage.cached_device_tokens + usage.cached_host_tokens == 8 * SIZE
    assert tiers.runner.num_computed - computed == usage.new_tokens


def test_a_partial_last_block_goes_to_the_host_and_comes_back() -> None:
    tiers = TwoTiers(num_slots=8, num_host_slots=40)
    first = tiers.open()
    tiers.say(first, [1] * 6, num_new=2)  # 7 tokens have KV: a block and three quarters
    tiers.fill(2)
    assert tiers.states(first) == ["host", "host"] and tiers.host_valid(first)[1] == 3
    usage = tiers.say(first, [9])
    assert (usage.cached_host_tokens, usage.recomputed_tokens, usage.new_tokens) == (7, 0, 2)


def test_what_is_written_behind_a_stored_tail_does_not_count_as_stored() -> None:
    tiers = TwoTiers(num_slots=8, num_host_slots=40)
    first = tiers.open()
    tiers.say(first, [1] * 6, num_new=2)
    tiers.fill(2)
    tiers.say(first, [9], num_new=1)  # comes back, and its tail grows
    blocks, tail = tiers.manager.blocks, first.table[1]
    assert blocks.host_valid[tail] <= blocks.num_valid[tail]
    tiers.fill(3)
    tiers.say(first, [8], num_new=5)  # `say` compares with a fresh run


def test_the_dropped_beginning_is_computed_while_the_rest_is_loaded() -> None:
    tiers = TwoTiers(num_slots=16, num_host_slots=40)
    first = tiers.tell(1, 10)
    tiers.fill(2)
    assert tiers.states(first)[:10] == ["host"] * 10
    for block in first.table.blocks[:3].tolist():
        tiers.manager.tiers._free_host_slot(block)
    turn = tiers.begin(first, [9])
    step = tiers.step()
    assert step is not None and len(step.plan.loads) == 7
    assert [(s.first, s.length) for s in step.plan.segments] == [(0, 3 * SIZE), (10 * SIZE, 2)]
    while turn.state is not TurnState.FINISHED:
        tiers.step()
    assert turn.usage is not None
    assert (turn.usage.cached_host_tokens, turn.usage.recomputed_tokens) == (7 * SIZE, 3 * SIZE)


def test_blocks_that_are_computed_faster_than_copied_are_computed() -> None:
    tiers = TwoTiers(num_slots=16, num_host_slots=40, costs=CostTable({4: 1.0, 64: 9.0}, load_s=4.0))
    first = tiers.tell(1, 10)
    tiers.fill(2)
    usage = tiers.say(first, [9])
    expected = sum(CostTable({4: 1.0, 64: 9.0}, 4.0).compute_s(i * SIZE) >= 4.0 for i in range(1, 11))
    assert 0 < expected < 10
    assert usage.cached_host_tokens == expected * SIZE
    assert usage.recomputed_tokens == (10 - expected) * SIZE


def test_suspended_turns_lose_nothing() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    turns = [tiers.begin(tiers.open(), [n] * 10, num_new=20) for n in (1, 2, 3)]
    was_suspended = False
    for _ in range(300):
        tiers.step()
        was_suspended |= any(turn.state is TurnState.WAITING and turn.num_generated for turn in turns)
    assert was_suspended and tiers.manager.statistics().num_loaded > 0
    for n, turn in enumerate(turns, 1):
        assert turn.reply_ids == stateless_reply([n] * 10, 20, frozenset())


# -- copies that fail


def test_a_failed_load_is_computed_again_and_told() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    first = tiers.tell(1, 8)
    tiers.fill(2)
    assert tiers.states(first)[:8] == ["host"] * 8
    tiers.transfer.num_to_fail = 0
    turn = tiers.begin(first, [9])
    step = tiers.core.plan()
    assert step is not None and len(step.plan.loads) == 8
    tiers.core.apply(step, replace(tiers.core.execute(step), failed_moves=frozenset(step.plan.loads[2:4])))
    tiers.manager.check()
    assert tiers.states(first)[:4] == ["both", "both", "dropped", "dropped"]
    while turn.state is not TurnState.FINISHED:
        tiers.step()
    usage = turn.usage
    assert usage is not None
    assert (usage.cached_host_tokens, usage.recomputed_tokens) == (6 * SIZE, 2 * SIZE)
    assert tiers.manager.statistics().num_failed_copies == 2


def test_nothing_is_computed_once_more_from_what_is_still_being_loaded() -> None:
    """The last position is written over by a turn that repeats it: not from garbage."""
    tiers = TwoTiers(num_slots=8, num_host_slots=40)
    first = tiers.tell(1, 2)
    tiers.fill(2)
    tiers.core.rewind(first, first.tokens[: 2 * SIZE])
    tiers.transfer.num_to_fail = 1
    last = 2 * SIZE - 1
    sampling = SamplingParams(max_tokens=3)
    turn = tiers.core.begin(first, TurnId("t"), [first.tokens[last]], sampling, seed=0, first_token=last)
    tiers.step()
    tiers.core.finish(turn, FinishReason.CANCELLED, None)
    tiers.say(first, [9])


def test_an_early_load_keeps_what_it_loads_on_the_host() -> None:
    tiers = TwoTiers(num_slots=8, num_host_slots=7)
    waiting = tiers.tell(1, 6)
    tiers.fill(2)
    assert tiers.states(waiting).count("host") > 1
    tiers.core.scheduler.max_concurrent = 0
    tiers.begin(waiting, [9])
    while (step := tiers.step()) is not None:
        assert all(min(move) >= 0 for move in step.plan.loads)


def test_a_step_planned_upon_a_load_that_fails_counts_for_nothing() -> None:
    """The load belongs to a step that only copies, and the next one is launched before that is known."""
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    first = tiers.tell(1, 8)
    tiers.fill(2)
    tiers.core.scheduler.max_concurrent = 0
    turn = tiers.begin(first, [9], num_new=2)
    loading = tiers.core.plan()
    assert loading is not None and loading.plan.loads and not loading.plan.segments
    tiers.core.scheduler.max_concurrent = 4
    computing = tiers.core.plan()
    assert computing is not None and computing.plan.segments
    result, failed = tiers.core.execute(loading), loading.plan.loads[0]
    tiers.runner.kv[failed.device_slot] = GARBAGE
    assert tiers.core.apply(loading, replace(result, failed_moves=frozenset([failed]))) == []
    assert tiers.core.apply(computing, tiers.core.execute(computing)) == []
    while turn.state is not TurnState.FINISHED:
        tiers.step()
    assert turn.reply_ids == stateless_reply(
        [*[1] * (8 * SIZE), *first.tokens[8 * SIZE : -2]], 2, frozenset()
    )


def test_a_store_that_fails_ahead_of_time_loses_nothing() -> None:
    tiers = TwoTiers(num_slots=16)
    tiers.transfer.num_to_fail = 1000
    idle = tiers.tell(1, 13)
    tiers.transfer.num_to_fail = 0
    assert tiers.manager.statistics().num_evicted == 0
    assert tiers.say(idle, [9]).cached_device_tokens == 13 * SIZE


def test_a_copy_of_what_was_given_up_meanwhile_does_not_count() -> None:
    tiers = TwoTiers(num_slots=8, num_host_slots=40)
    first = tiers.open()
    tiers.say(first, [1] * 6, num_new=2)
    tiers.fill(2)
    turn = tiers.begin(first, [9])
    step = tiers.core.plan()
    assert step is not None and step.plan.loads
    blocks, tail = tiers.manager.blocks, first.table[1]
    assert blocks.residency(tail) is Residency.LOADING
    tiers.core.finish(turn, FinishReason.CANCELLED, None)
    tiers.core.rewind(first, first.tokens[:5])
    tiers.core.apply(step, tiers.core.execute(step))
    tiers.manager.check()
    assert blocks.num_valid[tail] <= 1
    tiers.say(first, [8])


def test_a_conversation_that_leaves_memory_while_it_is_loaded_frees_everything_afterwards() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    first = tiers.tell(1, 8)
    second = tiers.fill(2)
    turn = tiers.begin(first, [9])
    step = tiers.core.plan()
    assert step is not None and step.plan.loads
    tiers.core.finish(turn, FinishReason.CANCELLED, None)
    tiers.core.forget(first)
    tiers.manager.check()
    tiers.core.apply(step, tiers.core.execute(step))
    tiers.core.forget(second)
    tiers.manager.check()
    statistics = tiers.manager.statistics()
    assert (statistics.num_free, statistics.num_host_free) == (12, 40)


def test_dropping_a_conversations_kv_empties_both_tiers() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=40)
    first, second = tiers.tell(1, 8), tiers.fill(2)
    for conversation in (first, second):
        tiers.manager.drop(conversation.table)
    statistics = tiers.manager.statistics()
    assert (statistics.num_free, statistics.num_host_free) == (12, 40)


def test_the_books_notice_a_block_without_a_slot_and_one_copied_without_a_pin() -> None:
    tiers = TwoTiers()
    conversation = tiers.tell(1, 2)
    tiers.manager.blocks.host_valid[conversation.table[0]] = 4
    with pytest.raises(InvariantError, match="claims KV without a slot"):
        tiers.manager.check()


def test_an_idle_engine_plans_nothing_once_the_host_holds_what_is_worth_more() -> None:
    tiers = TwoTiers(num_slots=12, num_host_slots=3, policy=retention(COSTS))
    for n in (1, 2, 3):
        tiers.tell(n, 5)  # `say` returns only when no step can be planned
    assert tiers.core.plan() is None
    assert StepResult().failed_moves == frozenset()
